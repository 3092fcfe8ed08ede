"""``Processor``: one published method with its parameters. It says what it wants and computes no attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .edits import Edit, Reaction
from .errors import SteeringError
from .nursing import Moment, Nursing, map_layers
from .site import AttentionCall, Kind, Site
from .steps import StepEnd
from .where import Where

if TYPE_CHECKING:
    from torch import Tensor

    from .contrast import Counterpart

P = TypeVar("P", bound="Processor")


@dataclass(frozen=True)
class Processor:
    """Base of all methods: a frozen dataclass of the method's hyper-parameters.

    A method overrides ``plan`` where the edit does not depend on the data (asked once per site at attach), ``react``
    where it does (asked in every kernel call), ``nursing`` where it moves the latent instead (asked once at attach), or
    ``contrast`` and ``combine`` where it compares two predictions of the next token. A method whose layers must know
    the whole prompt beforehand gives a ``survey``.
    The class attributes say where the method may act:

    * ``kinds``: kinds of sites, in order of preference (see ``Where.select``);
    * ``lanes``: rows beyond the plain ones that the method needs: ``"perturbed"`` (a second prediction of the
      conditional rows with the edits on, for guidance; needs ``guidance``) or ``"image_free"`` (the same prompt without
      its image, in lock-step, before generation; what ``react`` leaves in its states then are tensors whose first
      axis are the rows of the prompt, in which variants that do not ask may be missing);
    * ``reads_only``: ``react`` only looks and never gives an edit, so that it goes with guidance;
    * ``reads_rows``: ``react`` reads other rows of the batch, so that no row may run without them;
    * ``call``: how to use a method that asks a model several times instead of acting inside it (``CARVE``), as a line
      of Python; such a method cannot be attached, and has ``answers`` for several questions (as ``CARVE.answers``);
    * ``last_row_only``: every edit changes the output of the last query row alone, so that prompts with one prefill can
      be shared (``attnsteer.prefill``);
    * ``per_row``: numbers that ``react`` takes through ``AttentionCall.by_row``: rows that differ in these alone (and
      in their layers and heads, at which it must not look) are asked together, so that many strengths cost one;
    * ``samples``: edits of the kinds that ``react`` gives, so that pairs that do not compose are refused at attach.
    """

    where: Where = Where()

    kinds: ClassVar[tuple[Kind, ...]] = ("self", "joint", "cross", "causal")
    lanes: ClassVar[tuple[str, ...]] = ()
    reads_only: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = False
    call: ClassVar[str] = ""
    last_row_only: ClassVar[bool] = False
    per_row: ClassVar[tuple[str, ...]] = ()
    samples: ClassVar[tuple[Edit, ...]] = ()

    def where_for(self, sites: Sequence[Site]) -> Where:
        """The selection on a model; methods whose default depends on the number of layers override it."""
        nursing = self.nursing()
        if nursing is None or nursing.level is None:
            return self.where
        return map_layers(self.where, sites, nursing.level, nursing.finer)

    def plan(self, site: Site, heads: tuple[int, ...]) -> Edit | None:
        """The edit at a site, with tensors of one row (``(1, H)``); None where the method needs nothing there."""
        return None

    def react(self, call: AttentionCall) -> Reaction:
        """The edit for one kernel call, with tensors of all its rows, or a tuple of several; None for the untouched
        kernel."""
        return None

    def survey(self, sites: Sequence[Site]) -> Processor | None:
        """A reader (``reads_only``) that is shown the plain prompt before a generation, in one prefill without edits
        and without a cache; None where the method needs none. Language models only.

        What its ``react`` leaves in ``call.shared`` is in ``call.shared`` of this method at all of its own sites:
        tensors whose first axis are the rows of the prompt. Variants that do not ask may be missing while it reads, and
        hold zeros afterwards. Its ``where`` says what it reads. Surveys that are equal are read once, so it should not
        hold strengths.
        """
        return None

    @property
    def needs(self) -> tuple[str, ...]:
        """What ``react`` must know beyond the order of tokens: ``"grid"``, ``"rotary"``, ``"question"`` or ``"words"``
        (of the question; takes the tokenizer) of ``Spans``, or the ``"residual"`` stream entering each layer of a
        language model; who reads that sees every prompt, also outside its ``steps``."""
        return ()

    @property
    def marker(self) -> str:
        """The text by which a prompt that was typed by hand asks for the answer, e.g. ``"ASSISTANT:"``, where there is
        no chat template that says so."""
        return ""

    def plain_first(self, moment: Moment) -> bool:
        """Whether the model runs once more before its forward in this step, plainly and on the same rows, so that
        ``note`` can look (diffusion pipelines)."""
        return False

    def note(self, call: AttentionCall, moment: Moment) -> None:
        """Leave in ``call.state`` what ``react`` shall know of one kernel call of that plain forward."""

    def after_step(self, states: Mapping[Site, dict[str, Any]], end: StepEnd) -> None:
        """A step in which the method acted is over: turn what its sites saw into what they use in the next one.

        Outside of the model, so that the host may wait for the device here (diffusion pipelines).
        """

    def nursing(self) -> Nursing | None:
        """A loss on the maps of words that the latent follows before each step (``attnsteer.nursing``); None where the
        method has none."""
        return None

    def guidance(self, timestep: float) -> float:
        """Scale w of ``w * (cond - perturbed)`` at a scheduler timestep (methods with the ``perturbed`` lane)."""
        return 0.0

    def contrast(self) -> Counterpart | None:
        """What a second prediction of every token is made from (``attnsteer.contrast``); None where the method needs
        none. A contrast edits no attention, and the second prediction is that of the plain model."""
        return None

    def combine(self, logits: Tensor, other: Tensor, step: Tensor) -> Tensor:
        """The logits that the next token is chosen by (methods with a ``contrast``).

        Args:
            logits: ``(B, T, V)`` of the steered prompt, float32 or wider.
            other: ``(B, T, V)`` of the counterpart.
            step: ``(T,)`` int: how many tokens were generated before each of these predictions.
        """
        raise NotImplementedError(f"{type(self).__name__} has a contrast, so it has to say how to combine it.")

    @property
    def token_agnostic(self) -> bool:
        """True where the edit holds without knowing which token is what (families without a descriptor)."""
        return False

    @property
    def inert(self) -> bool:
        """True where the parameters make the method a no-op (strength 0): the engine then leaves the model alone."""
        return False

    @property
    def finds_words(self) -> bool:
        """True where ``after_step`` looks for words in the prompt."""
        return False

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the host shall find out about the model or the picture, by name, with parameters; ``call.state`` then
        holds it under that name in every generation. Language models know ``"massive_channels"`` (the ratio to the RMS
        from which a channel of the residual stream counts) and ``"cls_attention"`` (layers of the vision tower)."""
        return {}

    @property
    def removal(self) -> str:
        """How the image is taken out of the ``image_free`` lane: ``"delete"`` drops its tokens, ``"mask"`` hides them.
        Methods that are attached together share one lane, so they need the same; most make it a parameter."""
        return "delete"

    def refusals(self, site: Site) -> list[str]:
        """Reasons why the method cannot act at a selected site; empty where it can."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values; ``attnsteer.config.processor_from_dict`` reads them back."""
        from .config import processor_to_dict

        return processor_to_dict(self)

    def save_pretrained(self, directory: str) -> None:
        """Write ``attnsteer_config.json`` into a folder. Loading it never runs code."""
        from .config import save_processors

        save_processors([self], directory)

    @classmethod
    def from_pretrained(cls: type[P], source: str) -> P:
        """Read a processor of this class from a folder or a hub id."""
        from .config import load_processors

        found = [p for p in load_processors(source) if isinstance(p, cls)]
        if len(found) != 1:
            raise SteeringError(
                f"{source!r} holds {len(found)} processors of class {cls.__name__}; wanted is exactly one."
            )
        return found[0]


def check_number(owner: Processor, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse a parameter that is no finite number in ``[low, high]``. For ``__post_init__`` of processors."""
    value = getattr(owner, name)
    if not _is_number(value, low, high):
        upward = f" to {high:g}" if high < math.inf else " up"
        bounds = f"a number from {low:g}{upward}" if low > -math.inf else "a finite number"
        raise SteeringError(f"{type(owner).__name__}({name}={value!r}) is out of range: allowed is {bounds}.")


def check_numbers(owner: Processor, name: str, count: int, low: float = -math.inf) -> None:
    """Refuse a parameter that is not a tuple of ``count`` finite numbers from ``low`` up."""
    values = getattr(owner, name)
    if not isinstance(values, (tuple, list)) or len(values) != count or not all(_is_number(v, low) for v in values):
        bounds = f"numbers from {low:g} up" if low > -math.inf else "finite numbers"
        raise SteeringError(f"{type(owner).__name__}({name}={values!r}): give a tuple of {count} {bounds}.")


def check_integer(owner: Processor, name: str, low: int = 0, high: int | None = None) -> None:
    """Refuse a parameter that is no int from ``low`` to ``high``."""
    value = getattr(owner, name)
    if not _is_integer(value) or value < low or (high is not None and value > high):
        bounds = f"an int from {low}" + (" up" if high is None else f" to {high}")
        raise SteeringError(f"{type(owner).__name__}({name}={value!r}) is out of range: allowed is {bounds}.")


def check_integers(owner: Processor, name: str, count: int | None = None) -> None:
    """Refuse a parameter that is not a tuple of ints from 0 up, ``count`` of them where that is given."""
    values = getattr(owner, name)
    fits = isinstance(values, (tuple, list)) and count in (None, len(values))
    if not fits or not all(_is_integer(v) and v >= 0 for v in values):
        several = "" if count is None else f"{count} "
        raise SteeringError(f"{type(owner).__name__}({name}={values!r}): give a tuple of {several}ints from 0 up.")


def check_thresholds(owner: Processor, name: str) -> None:
    """Refuse a parameter that is not a mapping of steps to finite numbers."""
    values = getattr(owner, name)
    fits = isinstance(values, Mapping) and all(_is_integer(k) and k >= 0 and _is_number(v) for k, v in values.items())
    if not fits:
        raise SteeringError(f"{type(owner).__name__}({name}={values!r}): give a number for each step, {{0: 0.05}}.")


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and math.isfinite(value) and low <= value <= high


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_choice(owner: Processor, name: str, allowed: tuple[str, ...]) -> None:
    """Refuse a parameter that is not one of the allowed words."""
    value = getattr(owner, name)
    if value not in allowed:
        raise SteeringError(
            f"{type(owner).__name__}({name}={value!r}) is not known: allowed are {', '.join(map(repr, allowed))}."
        )


def parameters(processor: Processor) -> dict[str, Any]:
    """Field names and values of a processor, in declaration order."""
    return {f.name: getattr(processor, f.name) for f in fields(processor)}

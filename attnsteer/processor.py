"""``Processor``: one published method with its parameters. It says what it wants and computes no attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from .edits import Edit, Reaction
from .errors import SteeringError
from .nursing import Nursing, map_layers
from .site import AttentionCall, Kind, Site
from .where import Where

P = TypeVar("P", bound="Processor")


@dataclass(frozen=True)
class Processor:
    """Base of all methods: a frozen dataclass of the method's hyper-parameters.

    A method overrides ``plan`` where the edit does not depend on the data (asked once per site at attach), ``react``
    where it does (asked in every kernel call), or ``nursing`` where it moves the latent instead (asked once at attach).
    The class attributes say where the method may act:

    * ``kinds``: kinds of sites, in order of preference (see ``Where.select``);
    * ``lanes``: rows beyond the plain ones that the method needs: ``"perturbed"`` (a second prediction of the
      conditional rows with the edits on, for guidance; needs ``guidance``) or ``"image_free"`` (the same prompt without
      its image, in lock-step, before generation);
    * ``reads_only``: ``react`` only looks and never gives an edit, so that it goes with guidance;
    * ``reads_rows``: ``react`` reads other rows of the batch, so that no row may run without them;
    * ``needs``: what ``react`` must know beyond the order of tokens: ``"grid"`` or ``"rotary"`` of ``Spans``, or the
      ``"residual"`` stream entering each layer of a language model; who reads that sees every prompt, also outside its
      ``steps``;
    * ``samples``: edits of the kinds that ``react`` gives, so that pairs that do not compose are refused at attach.
    """

    where: Where = Where()

    kinds: ClassVar[tuple[Kind, ...]] = ("self", "joint", "cross", "causal")
    lanes: ClassVar[tuple[str, ...]] = ()
    reads_only: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
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

    def nursing(self) -> Nursing | None:
        """A loss on the maps of words that the latent follows before each step (``attnsteer.nursing``); None where the
        method has none."""
        return None

    def guidance(self, timestep: float) -> float:
        """Scale w of ``w * (cond - perturbed)`` at a scheduler timestep (methods with the ``perturbed`` lane)."""
        return 0.0

    @property
    def token_agnostic(self) -> bool:
        """True where the edit holds without knowing which token is what (families without a descriptor)."""
        return False

    @property
    def inert(self) -> bool:
        """True where the parameters make the method a no-op (strength 0): the engine then leaves the model alone."""
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
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        upward = f" to {high:g}" if high < math.inf else " up"
        bounds = f"a number from {low:g}{upward}" if low > -math.inf else "a finite number"
        raise SteeringError(f"{type(owner).__name__}({name}={value!r}) is out of range: allowed is {bounds}.")


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

"""A model of lmms-eval that answers with a method of attnsteer.

    python -m lmms_eval --model attnsteer --tasks pope --batch_size 8 \\
        --model_args "pretrained=llava-hf/llava-1.5-7b-hf,method=vhr:alpha=2"

``method`` is that of ``attnsteer compare --method`` (default: the plain model). lmms-eval splits ``--model_args`` at
commas, so a method with several parameters stands in quotes: ``method='vhr:alpha=2,layers=4:8'``.

lmms-eval finds ``manifest`` by the entry-point group ``lmms_eval.models``; it is imported by nobody else. Tasks that
generate from one picture a request are answered, greedily; sampling, beams, several pictures, videos and tasks that
compare likelihoods are refused.

Tried with lmms-eval 0.7.3: its registry finds the class by the manifest, its base class makes it from ``--model_args``,
and its requests are answered by the embedded model. The tests use stand-ins for these. Not tried: a whole evaluation
(its tasks download their data), and several processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..compare.methods import BASELINE
from ..compare.samples import Sample
from ..errors import SteeringError

if TYPE_CHECKING:
    from ..compare.answering import Answerer
    from ..compare.methods import Method

NAME, CLASS = "attnsteer", "AttnSteer"
LIMIT = 1024
"""Most tokens of an answer where a task sets no limit, as lmms-eval's own models have it."""
IMAGE = "<image>"
"""What some tasks put before their question; the chat template knows where the picture goes."""


def manifest() -> Any:
    """What lmms-eval registers: the class is made when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.{CLASS}")


def __getattr__(name: str) -> Any:
    if name == CLASS:
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, eq=False)
class Given:
    """A PIL picture that is open already."""

    picture: Any

    def open(self) -> Any:
        return self.picture.convert("RGB")

    def digest(self) -> str:
        return hashlib.sha256(self.picture.tobytes()).hexdigest()


@dataclass(frozen=True)
class Request:
    """One question and how it is to be answered: most tokens, and texts that end the answer."""

    sample: Sample
    limit: int
    until: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Sequence[Any], documents: Mapping[str, Any]) -> Request:
        """From the arguments of lmms-eval's ``generate_until``: context, generation settings, a function from document
        to pictures, id of the document, task and split.

        Raises:
            SteeringError: other than one picture, sampling or beams.
        """
        context, settings, visuals, number, task, split = arguments
        pictures = list(visuals(documents[task][split][number]) or ())
        name = f"{task}-{number}"
        if len(pictures) != 1 or not hasattr(pictures[0], "convert"):
            raise SteeringError(f"{name} shows other than one picture; attnsteer answers about one picture a request.")
        if settings.get("do_sample") or settings.get("temperature") or (settings.get("num_beams") or 1) > 1:
            raise SteeringError(f"{name} asks for sampling or beams ({settings}); attnsteer answers greedily.")
        until = settings.get("until") or ()
        ends = (until,) if isinstance(until, str) else tuple(until)
        question = context.replace(IMAGE, "").strip()
        limit = int(settings.get("max_new_tokens") or LIMIT)
        return cls(Sample(name, name, Given(pictures[0]), question, ()), limit, tuple(end for end in ends if end))


def answers(answerer: Answerer, method: Method, requests: Sequence[Request], batch_size: int) -> list[str]:
    """Answers in the order of the requests; those of one batch have the same limit."""
    found: dict[int, str] = {}
    for places in _batches(requests, batch_size):
        limit = requests[places[0]].limit
        (said,) = answerer([requests[place].sample for place in places], [method], limit)
        for place, answer in zip(places, said, strict=True):
            found[place] = _ended(answer.text, requests[place].until)
    return [found[place] for place in range(len(requests))]


def _batches(requests: Sequence[Request], size: int) -> Iterator[list[int]]:
    for limit in dict.fromkeys(request.limit for request in requests):
        places = [place for place, request in enumerate(requests) if request.limit == limit]
        yield from (places[start : start + size] for start in range(0, len(places), size))


def _ended(text: str, until: Sequence[str]) -> str:
    """The text before the first of the ends."""
    return min((text.split(end)[0] for end in until), key=len, default=text)


@cache
def _model_class() -> type[Any]:
    from lmms_eval.api.model import lmms

    class AttnSteer(lmms):
        """A vision-language model with one method of attnsteer.

        Args:
            pretrained: folder, hub id or an embedded model.
            method: as in ``attnsteer compare --method``.
            device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...; of several processes each has the GPU of its local rank.
            dtype: ``"auto"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            batch_size: questions at once; a number, as nothing here looks for the largest that fits.
            max_batch_size: given by lmms-eval; not used.

        Raises:
            SteeringError: a batch size that is none, or a model or method that cannot be had.
        """

        is_simple = True

        def __init__(
            self,
            pretrained: str,
            method: str = BASELINE,
            device: str = "auto",
            dtype: str = "auto",
            batch_size: int | str = 1,
            max_batch_size: int | None = None,
        ) -> None:
            from ..compare.answering import Answerer
            from . import models
            from .compare import local_device, parsed

            super().__init__()
            if not str(batch_size).isdecimal() or int(batch_size) < 1:
                raise SteeringError(f"batch_size {batch_size!r} is no number of questions: give a whole number from 1.")
            self.method, self.batch_size = parsed(method.strip("'\""), pretrained), int(batch_size)
            model, processor = models.load(pretrained, local_device(device), dtype)
            if processor is None:
                raise SteeringError(f"{pretrained!r} makes pictures: lmms-eval's tasks ask questions about them.")
            self.answerer = Answerer(model, processor)
            self.answerer.groups([self.method])
            self.device = model.device

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            asked = [Request.of(request.args, self.task_dict) for request in requests]
            return answers(self.answerer, self.method, asked, self.batch_size)

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError("attnsteer answers tasks that generate; this one compares likelihoods.")

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise NotImplementedError("attnsteer answers one question at a time; this task has several rounds.")

    AttnSteer.__module__, AttnSteer.__qualname__ = __name__, CLASS
    return AttnSteer

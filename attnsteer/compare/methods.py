"""What is compared: the plain model, methods, and controls of the same strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ..controls import HEADS, Elsewhere, edits_heads
from ..digests import tensor_digest
from ..errors import SteeringError
from ..lines import identity
from ..plain import encode
from ..processor import Processor

BASELINE = "baseline"
CONTROLS = {f"{heads}-heads": heads for heads in HEADS}
"""Names of controls, and which heads they use (``attnsteer.controls.Elsewhere``)."""


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: its name there.
        processors: what is attached, or one that asks the model several times (``Processor.call``); empty for the plain
            model.
        control_of: the label of the method that it is a control of; "" for methods.
    """

    label: str
    processors: tuple[Processor, ...] = ()
    control_of: str = ""

    @cached_property
    def digest(self) -> str:
        """A hash of what it does; the label does not count."""
        return identity({"processors": [plain(processor) for processor in self.processors]})

    @property
    def around(self) -> Any | None:
        """The processor that is not attached but asks the model by itself; None for all other methods."""
        return self.processors[0] if len(self.processors) == 1 and self.processors[0].call else None


def plain(processor: Any) -> dict[str, Any]:
    """A processor as JSON values; a tensor by a hash of its content, processors inside processors likewise."""
    values: dict[str, Any] = {}
    for field in fields(processor):
        value = getattr(processor, field.name)
        if isinstance(value, Processor):
            values[field.name] = plain(value)
            continue
        tensors: dict[str, Any] = {}
        values[field.name] = encode(value, field.name, tensors, field.name)
        if tensors:
            values[f"{field.name} content"] = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return {"processor": type(processor).__name__, "parameters": values}


def control(method: Method, name: str, seed: int = 0) -> Method:
    """The same edits on other heads than the method chose: a disturbance of the same strength without its idea.

    Of several processors those that edit heads are moved, and the others stay as they are.

    Args:
        name: ``random-heads``, ``all-heads`` or ``rest-heads``.
        seed: of the draw of heads.

    Raises:
        SteeringError: there is no such control, or the method has no heads to move.
    """
    if name not in CONTROLS:
        raise SteeringError(f"There is no control {name!r}; there are {', '.join(CONTROLS)}.")
    if not has_heads(method):
        raise SteeringError(f"{method.label!r} edits no heads, so that it has no control on others.")
    moved = tuple(
        Elsewhere(method=each, heads=CONTROLS[name], seed=seed) if edits_heads(each) else each
        for each in method.processors
    )
    return Method(f"{method.label}, {name}", moved, method.label)


def has_heads(method: Method) -> bool:
    """Whether a control can move what the method does to other heads."""
    return any(edits_heads(processor) for processor in method.processors)


def with_controls(methods: Sequence[Method], names: Sequence[str], seed: int = 0) -> list[Method]:
    """Every method, the plain model first, and behind each that edits heads its controls.

    Raises:
        SteeringError: two methods of one name or doing the same, or a control that no method has.
    """
    if names and not any(map(has_heads, methods)):
        raise SteeringError(f"None of the methods edits heads, so that {names[0]} has nothing to move.")
    ordered = [Method(BASELINE), *(method for method in methods if method.processors)]
    twice = [m.label for i, m in enumerate(ordered) if m.label in {other.label for other in ordered[:i]}]
    if twice:
        raise SteeringError(f"Two methods are called {twice[0]!r}: give one of them a name, NAME=METHOD.")
    found = []
    for method in ordered:
        found.append(method)
        found += [control(method, name, seed) for name in names if has_heads(method)]
    same: dict[str, str] = {}
    for method in found:
        if method.digest in same:
            raise SteeringError(f"{method.label!r} and {same[method.digest]!r} are the same method.")
        same[method.digest] = method.label
    return found

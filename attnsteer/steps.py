"""Between two steps of a diffusion pipeline: what a method is told when one is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .nursing import Groups, Moment


@dataclass(frozen=True)
class StepEnd:
    """A step that is over, for one processor.

    Attributes:
        moment: which step.
        mine: for each picture whether the processor acts on it.
        conditional: ``batch -> slice``: the rows of a denoiser call of so many rows that are conditional.
        columns: ``(words, picture, text keys) -> positions``: for each group of words where its tokens are among the
            text keys of a picture.
    """

    moment: Moment
    mine: Sequence[bool]
    conditional: Callable[[int], slice]
    columns: Callable[[Groups, int, int], list[tuple[int, ...]]]

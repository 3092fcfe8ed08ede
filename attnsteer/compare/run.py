"""Asking: every sample of every task, of every method, in batches; what is there already is not asked again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .answered import Answered
from .answering import Answer, Answerer
from .methods import Method
from .samples import Sample
from .store import Answers, Entry
from .tasks import Task
from .verified import keep, verified

Progress = Callable[[str, int, int], None]
"""``(task, answers there, answers wanted)``, whenever some are there."""


class Failure(NamedTuple):
    """Why there is no answer."""

    reason: str


Said = tuple[Sample, Method, Answer | Failure]


@dataclass
class Comparison(Answered):
    """Tasks and methods on one model.

    Args:
        answerer: the model.
        tasks: what is asked.
        methods: of whom, the plain model first.
        answers: where everything is kept.
        batch_size: samples at once; rows are that many for each method of a batch.
        rank, count: number of this process, and how many there are. Process r takes every count-th batch.
        progress: told about every batch.

    Batches are cut from the list of samples and not from what is missing, and a batch that was interrupted is asked
    again as a whole, for all methods that lack anything: rows see the shapes of an uninterrupted run of one process.
    (Unless nothing but the last batch is missing, and only for some methods; other shapes change rounding alone.)
    """

    answerer: Answerer
    tasks: Sequence[Task]
    methods: Sequence[Method]
    answers: Answers
    batch_size: int = 8
    rank: int = 0
    count: int = 1
    progress: Progress = lambda task, done, total: None
    runs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._groups = self.answerer.groups(self.methods)
        self._rows: int | None = None  # most rows that have fitted into memory, once some have not
        for task in self.tasks:
            settings = {**self.answerer.settings(task.max_new_tokens), "task": task.settings}
            self.runs[task.name] = self.answers.begin(settings)

    def run(self) -> None:
        """Ask what is missing of the share of this process."""
        for task in self.tasks:
            wanted = [self._lacking(task, group, task.samples) for group in self._groups]
            done, total = self.there(task)
            for batch in list(_batches(task.samples, self.batch_size))[self.rank :: self.count]:
                for group in wanted:
                    for said in self._ask(task, batch, group) if self._lacking(task, group, batch) else ():
                        done += self._keep(task, said)
                        self.progress(task.name, done, total)

    def verify(self, number: int, seed: int = 0) -> dict[str, dict[str, int]]:
        """Ask some samples of each task again, each alone: how often another answer comes by task and method.

        What is said is kept beside the answers, for this report and later ones (``verified``).
        """
        said = {}
        for task in self.tasks:
            for sample in random.Random(seed).sample(list(task.samples), min(number, len(task.samples))):
                for method in self.methods:
                    ((answer,),) = self.answerer([sample], [method], task.max_new_tokens)
                    said[self.key(task, sample, method)] = answer.text
        keep(self.answers.folder, said)
        found = verified(self)
        return {task.name: found.get(task.name, {}) for task in self.tasks}

    def _lacking(self, task: Task, methods: Sequence[Method], samples: Sequence[Sample]) -> list[Method]:
        """Methods without an answer to one of the samples."""
        return [m for m in methods if any(self.key(task, s, m) not in self.answers.answers for s in samples)]

    # ---- one batch ---------------------------------------------------------------------------------------------------
    def _ask(self, task: Task, samples: Sequence[Sample], methods: Sequence[Method]) -> Iterator[list[Said]]:
        """Answers to a batch, in parts where memory or an error asks for it."""
        rows = len(samples) * len(methods)
        if self._rows is not None and rows > self._rows:
            yield from self._halves(task, samples, methods, len(samples) > 1)
            return
        try:
            said = self.answerer(samples, methods, task.max_new_tokens)
        except Exception as error:
            reason, short_of_memory = f"{type(error).__name__}: {' '.join(str(error).split())}", out_of_memory(error)
        else:
            yield [(s, m, a) for m, row in zip(methods, said, strict=True) for s, a in zip(samples, row, strict=True)]
            return
        # outside of the handler, so that nothing holds the tensors of the failed call any more
        if rows == 1:
            yield [(samples[0], methods[0], Failure(reason))]
            return
        if short_of_memory:
            _give_back()
            self._rows = rows // 2
        # one method that fails must not take the others with it
        by_samples = len(methods) == 1 or (short_of_memory and len(samples) > 1)
        yield from self._halves(task, samples, methods, by_samples)

    def _halves(
        self, task: Task, samples: Sequence[Sample], methods: Sequence[Method], by_samples: bool
    ) -> Iterator[list[Said]]:
        """The two halves of a batch: of its samples, or of its methods."""
        if by_samples:
            middle = len(samples) // 2
            parts = [(samples[:middle], methods), (samples[middle:], methods)]
        else:
            middle = len(methods) // 2
            parts = [(samples, methods[:middle]), (samples, methods[middle:])]
        for some, by in parts:
            yield from self._ask(task, some, by)

    def _keep(self, task: Task, said: Sequence[Said]) -> int:
        """Write answers; gives how many are new."""
        before = len(self.answers.answers)
        self.answers.add([self._entry(task, *each) for each in said])
        return len(self.answers.answers) - before

    def _entry(self, task: Task, sample: Sample, method: Method, answer: Answer | Failure) -> Entry:
        entry: dict[str, Any] = {**self.key(task, sample, method)._asdict(), "label": method.label}
        if isinstance(answer, Failure):
            return {**entry, "error": answer.reason}
        return {
            **entry,
            "prompt": sample.prompt,
            "output": answer.text,
            "tokens": list(answer.tokens),
            "finish": answer.finish,
            "counts": task.count(sample, answer.text, answer.finish == "length"),
        }


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    import torch

    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def _give_back() -> None:
    """Free what the failed call held."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""What is asked of whom and the answers that are there, whoever asked; the report is made of this alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .methods import Method
from .samples import Sample
from .store import Answers, Entry, Key
from .tasks import Task


class Answered:
    """Tasks and methods, and where their answers are kept.

    Attributes:
        tasks: what is asked; methods: of whom, the plain model first.
        answers: where everything is kept.
        runs: for each task the hash of the settings that its answers were given under.
    """

    tasks: Sequence[Task]
    methods: Sequence[Method]
    answers: Answers
    runs: dict[str, str]

    def key(self, task: Task, sample: Sample, method: Method) -> Key:
        """What the answer is kept under."""
        return Key(self.runs[task.name], task.name, sample.id, sample.digest, method.digest)

    def there(self, task: Task) -> tuple[int, int]:
        """Answers that are there, and how many are wanted."""
        found = sum(self.key(task, s, m) in self.answers.answers for s in task.samples for m in self.methods)
        return found, len(task.samples) * len(self.methods)

    def errors(self) -> dict[Key, str]:
        """What is missing because it failed, and why."""
        wanted = [self.key(t, s, m) for t in self.tasks for s in t.samples for m in self.methods]
        return {key: self.answers.errors[key] for key in wanted if key in self.answers.errors}

    def complete(self, task: Task) -> dict[str, list[Entry]]:
        """The answers to every sample that all methods have answered, in the order of the methods."""
        found = {}
        for sample in task.samples:
            entries = [self.answers.answers.get(self.key(task, sample, method)) for method in self.methods]
            there = [entry for entry in entries if entry is not None]
            if len(there) == len(entries):
                found[sample.id] = there
        return found


@dataclass
class Recorded(Answered):
    """Answers that other processes gave; nothing is asked, and no model is needed."""

    tasks: Sequence[Task]
    methods: Sequence[Method]
    answers: Answers
    runs: dict[str, str]

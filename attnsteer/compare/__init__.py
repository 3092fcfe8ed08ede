"""Hallucination metrics of methods side by side: the same samples, paired intervals, and what a gain has cost.

    from attnsteer.compare import Answerer, Answers, Comparison, Method, results, with_controls, world

    methods = with_controls([Method("VHR", (VHR(),))], ["random-heads"])
    comparison = Comparison(Answerer(model, processor), [world.describe()], methods, Answers(folder))
    comparison.run()
    results(comparison, "my model")["tasks"]["chair"]

``attnsteer compare`` is the same from the command line.
"""

from .answered import Answered, Recorded
from .answering import Answer, Answerer
from .looks import Looks
from .methods import BASELINE, CONTROLS, Method, control, with_controls
from .results import results
from .run import Comparison, Failure
from .samples import FilePicture, Sample, limited
from .store import Answers
from .tasks import Describe, Exists, Metric, Task

__all__ = [
    "BASELINE",
    "CONTROLS",
    "Answer",
    "Answered",
    "Answerer",
    "Answers",
    "Comparison",
    "Describe",
    "Exists",
    "Failure",
    "FilePicture",
    "Looks",
    "Method",
    "Metric",
    "Recorded",
    "Sample",
    "Task",
    "control",
    "limited",
    "results",
    "with_controls",
]

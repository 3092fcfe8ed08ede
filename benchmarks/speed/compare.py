"""Several methods in one comparison against one run for each: samples a second.

    python benchmarks/speed/compare.py --log                                    # the embedded model, on a CPU
    python benchmarks/speed/compare.py --task pope --log
    python benchmarks/speed/compare.py --model llava-7b --device cuda --dtype bfloat16 --log

What ``attnsteer compare`` does with five methods (the plain model is one), as a library: methods are rows of one batch,
pictures are seen once, and those that change the last row alone share a prefill (on a GPU where answers are short, as
with ``--task pope``). The peer asks the same samples five times, once for each method, with the same number of samples
in a batch, as five starts of a command with one method would; loading the model five times is not counted. A second
peer, without an aim, gets as many rows in a batch as the comparison has. Aims: at least 2.5 times as many samples a
second on a GPU, 1.3 times on a CPU.

Everything is counted but loading: pictures are rendered, answers kept on the disk and counted.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import measure
import tellers
from measure import Ratio

from attnsteer.cli.compare import parsed
from attnsteer.compare import Answerer, Answers, Comparison, Method, Task, limited, with_controls, world

METHODS = ("baseline", "vhr", "gift", "pai", "vaf")
"""Five that act on the embedded model; VAR's threshold is out of reach of its width."""
AIM = {"cuda": 2.5, "cpu": 1.3}
TOGETHER, APART, WIDE = "one comparison", "a run for each method", "a run for each method, as many rows"


def ask(answerer: Answerer, task: Task, methods: Sequence[Method], batch: int) -> None:
    """Ask everything in a new folder.

    Raises:
        RuntimeError: answers are missing; their time would mean nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = Answers(Path(folder))
        try:
            comparison = Comparison(answerer, [task], methods, answers, batch)
            comparison.run()
            if comparison.errors():
                raise RuntimeError(f"not answered: {next(iter(comparison.errors().values()))}")
        finally:
            answers.close()


def measured(answerer: Answerer, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """One comparison of all methods, and the same answers in runs of one method."""
    whole: Any = world.describe() if options.task == "chair" else world.exists()
    tokens = options.tokens or whole.max_new_tokens
    task = cast(Task, replace(whole, samples=limited(whole.samples, options.samples, 0), max_new_tokens=tokens))
    methods = with_controls([parsed(text, "world-llava") for text in options.method or METHODS], [])
    for sample in task.samples:
        _ = sample.digest  # kept by the sample: no case should pay for it alone

    def apart(batch: int) -> None:
        for method in methods:
            ask(answerer, task, [method], batch)

    cases = {
        TOGETHER: lambda: ask(answerer, task, methods, options.batch_size),
        APART: lambda: apart(options.batch_size),
        WIDE: lambda: apart(options.batch_size * len(methods)),
    }
    ratios = [
        Ratio(APART, TOGETHER, least=AIM[options.device]),
        Ratio(WIDE, TOGETHER),
        Ratio(TOGETHER, APART, what="memory"),
    ]
    settings |= {
        "methods": ", ".join(method.label for method in methods),
        "task": options.task,
        "samples": len(task.samples),
        "samples in a batch": options.batch_size,
        "most tokens": tokens,
    }
    found = measure.report(f"compare-{options.model}-{options.task}", options, cases, ratios, settings)
    for name, case in found["cases"].items():
        print(f"{name}: {len(task.samples) * len(methods) / case['median_s']:.2f} answers a second")
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.parser(__doc__, repeats=5)
    add = parser.add_argument
    add("--model", default="world-llava", choices=("world-llava", "llava-7b"), help="default: %(default)s")
    add("--scale", type=int, default=1, help="divide layers, heads and widths of llava-7b (default: 1)")
    add("--method", action="append", default=[], help=f"as of attnsteer compare (default: {', '.join(METHODS)})")
    asked = "chair describes pictures, pope asks for objects with four short questions each (default: %(default)s)"
    add("--task", default="chair", choices=("chair", "pope"), help=asked)
    add("--samples", type=int, default=32, help="pictures (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="samples at once (default: %(default)s, as the command's)")
    add("--tokens", type=int, help="most tokens of an answer (default: the task's own, 64 or 32)")
    options = parser.parse_args(arguments)
    teller = tellers.speaking(options.model, options.device, options.dtype, options.scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        text = teller.model.config.get_text_config(decoder=True)
        settings = {"model": options.model, "layers": text.num_hidden_layers, "width": text.hidden_size}
        return measured(Answerer(teller.model, teller.processor), options, settings)


if __name__ == "__main__":
    main()

"""What every training script needs: options, schedule, moving average, and a loop that can be killed and resumed.

Everything random in step i comes from (seed, i) alone, so a resumed run repeats the uninterrupted one exactly.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from attnsteer.world.train.muon import Muon

M = TypeVar("M", bound=nn.Module)


def parser(name: str, about: str | None, *, steps: int, batch: int, rate: float, out: str) -> argparse.ArgumentParser:
    """The command line of one training, with the options that all share."""
    made = argparse.ArgumentParser(
        prog=f"python -m attnsteer.world.train {name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--out", type=Path, default=Path(out), help="folder of the finished model (default: %(default)s)")
    add("--run", type=Path, help="folder of checkpoints (default: runs/<name of the --out folder>)")
    add("--steps", type=int, default=steps, help="optimizer steps in all (default: %(default)s)")
    add("--batch", type=int, default=batch, help="scenes in a step (default: %(default)s)")
    add("--rate", type=float, default=rate, help="highest learning rate (default: %(default)s)")
    add("--warmup", type=int, default=100, help="steps of rising learning rate (default: %(default)s)")
    add("--decay", type=float, default=0.25, help="last part of the run, with falling rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="everything random follows from it (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")
    add("--float32", action="store_true", help="no bfloat16 autocast: faster on CPUs without avx512_bf16 or amx")
    add("--compile", action="store_true", help="use torch.compile (needs a C++ compiler on CPU)")
    add("--resume", action="store_true", help="go on from the last checkpoint of --run, if there is one")
    add("--save-every", type=int, default=500, help="steps between checkpoints (default: %(default)s)")
    add("--export-every", type=int, default=0, help="also write the model folder every so many steps")
    add("--log-every", type=int, default=50, help="steps between printed losses (default: %(default)s)")
    return made


def prepare(options: argparse.Namespace) -> torch.device:
    """Apply --threads and --seed, make the folders, and give the device back."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.run = options.run or Path("runs") / options.out.name
    options.run.mkdir(parents=True, exist_ok=True)
    return torch.device(options.device)


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Learning rate factor at `step`: linear rise, flat, and a linear fall to 2 % over the last `decay` of the run."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    fall = min(1.0, max(0.02, (steps - step) / max(1.0, steps * decay)))
    return rise * fall


def generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The source of randomness of one step."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % (2**63))


def optimizers(
    model: nn.Module, options: argparse.Namespace, weight_decay: float, blocks: Sequence[str]
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices and convolutions of modules whose name contains one of `blocks`."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in trained if p.ndim >= 2 and any(part in name for part in blocks) and "norm" not in name]
    taken = {id(p) for p in inner}
    rest = [p for _, p in trained if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), fused=True)]
    if inner:
        found.append(Muon(inner, lr=options.rate, weight_decay=weight_decay))
    return found


@torch.no_grad()
def average(mean: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights, with a short memory at the start."""
    amount = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(mean.parameters()), list(model.parameters()), amount)


def save(file: Path, **state: object) -> None:
    """Write a checkpoint so that a kill in the middle leaves the old one whole."""
    part = file.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, file)


def restore(file: Path, model: nn.Module, mean: nn.Module, steppers: Sequence[torch.optim.Optimizer]) -> int:
    """Load what `save` wrote, and give the step that comes next."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    mean.load_state_dict(state["mean"])
    for stepper, saved in zip(steppers, state["optimizers"], strict=True):
        stepper.load_state_dict(saved)
    return int(state["step"])


def descend(
    model: nn.Module,
    loss: Callable[[int], torch.Tensor],
    steppers: Sequence[torch.optim.Optimizer],
    options: argparse.Namespace,
    step: int,
) -> torch.Tensor:
    """One step of training: the loss that it started from."""
    torch.manual_seed((options.seed * 7919 + step) % 2**31)
    for group in (group for stepper in steppers for group in stepper.param_groups):
        group["lr"] = options.rate * schedule(step, options.steps, options.warmup, options.decay)
    with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=not options.float32):
        value = loss(step)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
    model.zero_grad(set_to_none=True)
    return value


def fit(
    model: M,
    loss: Callable[[int], torch.Tensor],
    options: argparse.Namespace,
    *,
    export: Callable[[M], object],
    weight_decay: float = 0.01,
    blocks: Sequence[str] = (),
    ema: float = 0.999,
    name: str = "state",
) -> M:
    """Train `model` and return the moving average of its weights.

    Args:
        model: holds every trained parameter.
        loss: the scalar loss of step i; draws its data from (seed, i).
        options: what `parser` parsed.
        export: writes the averaged model to options.out.
        blocks: parts of the names of modules whose matrices Muon trains; all else is AdamW's.
        ema: memory of the moving average, 0 to 1.
        name: of the checkpoint file in options.run.
    """
    mean = copy.deepcopy(model).eval().requires_grad_(False)
    steppers = optimizers(model, options, weight_decay, blocks)
    file = options.run / f"{name}.pt"
    start = restore(file, model, mean, steppers) if options.resume and file.exists() else 0

    def checkpoint(step: int) -> None:
        states = [stepper.state_dict() for stepper in steppers]
        save(file, model=model.state_dict(), mean=mean.state_dict(), optimizers=states, step=step)

    report = Report(start, options.steps, options.log_every)
    model.train()
    for step in range(start, options.steps):
        report(step, descend(model, loss, steppers, options, step))
        average(mean, model, step, ema)
        if (step + 1) % options.save_every == 0:
            checkpoint(step + 1)
        if options.export_every and (step + 1) % options.export_every == 0:
            export(mean)
    report.close()
    if start < options.steps:
        checkpoint(options.steps)
    export(mean)
    return mean


class Report:
    """Progress: a bar on a terminal, plain lines otherwise."""

    def __init__(self, start: int, steps: int, every: int) -> None:
        self.steps, self.every, self.seen = steps, max(1, every), 0
        self.sum: torch.Tensor | float = 0.0
        self.bar, self.since = None, time.time()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=start)

    def __call__(self, step: int, value: torch.Tensor) -> None:
        self.sum, self.seen = self.sum + value.detach(), self.seen + 1
        if self.bar is not None:
            self.bar.update()
        if (step + 1) % self.every and step + 1 != self.steps:
            return
        mean, pace = float(self.sum) / self.seen, (time.time() - self.since) / self.seen
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{mean:.4f}")
        else:
            print(f"step {step + 1}/{self.steps}  loss {mean:.4f}  {pace:.3f} s/step", flush=True)
        self.sum, self.seen, self.since = 0.0, 0, time.time()

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()

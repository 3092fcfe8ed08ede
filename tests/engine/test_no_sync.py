"""The hot path never waits for the device: steering reads no value of a tensor in any step that plain calls do not.

On a GPU every such read (``.item()``, ``bool(tensor)``, ``nonzero``) stops the host until the device is done, and none
can stand in a CUDA graph. The detector counts them on any device; what a run does once, when it begins, is not counted:
the difference between a long and a short run is. With CUDA the driver's own detector looks at the decode step as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnsteer
from attnsteer import Where
from attnsteer.processors import (
    GIFT,
    PAG,
    PAI,
    PAINT,
    SEG,
    VAF,
    VAR,
    VHR,
    ConsistentSelfAttention,
    SharedSelfAttention,
    SoftPAG,
)
from tests.tiny import pipelines, vlms

from .common import latents

WAITING = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim", "_unique2")
"""Operators whose result or shape the host must read."""


class Waits(TorchDispatchMode):
    """Counts the operators that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        chosen = name.startswith("index") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for each in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in WAITING or chosen:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits(run: Callable[[], Any]) -> Counter[str]:
    with Waits() as mode:
        run()
    return mode.found


def test_the_detector_sees_what_waits() -> None:
    x = torch.arange(4.0)
    found = waits(lambda: (x.sum().item(), bool(x[0]), x[x > 1], x.nonzero(), torch.equal(x, x), x + x))
    assert found == {"_local_scalar_dense": 2, "index": 1, "nonzero": 1, "equal": 1}


PAINTERS: dict[str, tuple[str, attnsteer.Processor]] = {
    "SoftPAG": ("sd3", SoftPAG(Where(layers=[1, -1]), strength=0.5)),
    "PAG": ("sd15", PAG(Where(layers=[1]))),
    "SEG": ("flux", SEG(Where(layers=[1]))),
    "ConsistentSelfAttention": ("sd15", ConsistentSelfAttention(Where(steps=slice(0, None)), frames=1)),
    "SharedSelfAttention": ("sd15", SharedSelfAttention(Where(steps=slice(0, None)), frames=1, anchors=1)),
}
READERS: dict[str, attnsteer.Processor] = {
    "VHR": VHR(),
    "PAI": PAI(alpha=0.5),
    "VAF": VAF(),
    "VAR": VAR(Where(layers="all"), tau=1.2, floor=0.05, rho=0.1, channels=(3, 11)),
    "GIFT": GIFT(token_selector="all"),
    "PAINT": PAINT(),
}
BATCHES: dict[str, list[list[attnsteer.Processor]]] = {
    **{name: [[method]] for name, method in READERS.items()},
    "two VAR": [[READERS["VAR"]], [replace(READERS["VAR"], fraction=0.3)]],  # type: ignore[call-arg]
    "two PAI": [[READERS["PAI"]], [PAI(alpha=0.3)]],
    "two VAF": [[READERS["VAF"]], [VAF(alpha=0.3)]],
    "VAR and VAF": [[READERS["VAR"]], [READERS["VAF"], VHR()]],
}
"""For each row of the batch what it gets; one entry stands for all."""


@pytest.mark.parametrize("name", PAINTERS)
def test_denoising_steps(name: str) -> None:
    family, method = PAINTERS[name]
    pipe = pipelines.build(family)

    def by_steps(*methods: Any) -> Counter[str]:
        def run(steps: int) -> Counter[str]:
            with attnsteer.steer(pipe, *methods) if methods else nullcontext():
                return waits(lambda: latents(pipe, family, steps=steps))

        long, short = run(5), run(3)
        long.subtract(short)
        return +long

    assert by_steps(method) <= by_steps()


@pytest.mark.parametrize("name", BATCHES)
def test_decoding_steps(name: str) -> None:
    model, inputs = vlms.build("llava")
    given, rows = inputs(2), BATCHES[name]
    with torch.no_grad():
        plain = model(**given).logits[:, -1]
        with attnsteer.attach(model, variants=rows):
            assert (model(**given).logits[:, -1] != plain).any(-1).all()

    def by_tokens(rows: list[list[attnsteer.Processor]]) -> Counter[str]:
        def run(tokens: int) -> Counter[str]:
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            with attnsteer.attach(model, variants=rows) if rows else nullcontext():
                return waits(lambda: model.generate(**given, **options))

        long, short = run(8), run(4)
        long.subtract(short)
        return +long

    assert by_tokens(rows) <= by_tokens([])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's own detector of waiting needs a GPU")
@pytest.mark.parametrize("name", BATCHES)
def test_decoding_does_not_wait_for_a_gpu(name: str) -> None:
    model, inputs = vlms.build("llava")
    model.cuda()
    given = {key: value.cuda() for key, value in inputs(2).items()}
    with torch.no_grad(), attnsteer.attach(model, variants=BATCHES[name]):
        out = model(**given, use_cache=True)
        step = {"input_ids": given["input_ids"][:, -1:], "past_key_values": out.past_key_values}
        model(**step, use_cache=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**step, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")

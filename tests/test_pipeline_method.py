"""``pipe.set_attn_processor``: ours attach, stock ones are handed on, None restores, in either import order."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import attnsteer
from attnsteer import Processor, Site, SteeringError
from attnsteer.attach import attached_to
from attnsteer.edits import Edit, MeanValue, Mix
from attnsteer.processors import PAG
from tests.tiny import pipelines


@dataclass(frozen=True)
class Uniform(Processor):
    """Uniform attention at the chosen heads."""

    token_agnostic = True

    def plan(self, site: Site, heads: tuple[int, ...]) -> Edit:
        weight = torch.zeros(1, site.heads)
        weight[:, list(heads)] = 1.0
        return Mix(MeanValue(), weight)


def picture(pipe: Any, name: str = "sd15") -> np.ndarray:
    return pipe(**pipelines.call_kwargs(name), return_dict=False)[0]


def test_ours_attach_replace_each_other_and_leave_no_trace() -> None:
    pipe = pipelines.build("sd15")
    plain = picture(pipe)
    first = pipe.set_attn_processor(Uniform(attnsteer.Where(layers=0)))
    assert attached_to(pipe) is first
    changed = picture(pipe)
    second = pipe.set_attn_processor([Uniform(attnsteer.Where(layers=1))])
    assert attached_to(pipe) is second
    assert not first.attached
    other = picture(pipe)
    assert pipe.set_attn_processor(None) is None
    assert attached_to(pipe) is None
    assert not np.array_equal(plain, changed)
    assert not np.array_equal(changed, other)
    assert np.array_equal(picture(pipe), plain)
    pipe.set_attn_processor(None)


@pytest.mark.parametrize("form", ["one", "dict"])
def test_stock_processors_go_to_the_denoiser_and_none_brings_back_what_was(form: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    pipe = pipelines.build("sd15")
    before = dict(pipe.unet.attn_processors)
    stock: Any = AttnProcessor() if form == "one" else {name: AttnProcessor() for name in before}
    pipe.set_attn_processor(stock)
    assert all(isinstance(p, AttnProcessor) for p in pipe.unet.attn_processors.values())
    if form == "dict":
        assert len(stock) == len(before)
    pipe.set_attn_processor(Uniform())
    assert attached_to(pipe) is not None
    pipe.set_attn_processor(None)
    assert attached_to(pipe) is None
    assert pipe.unet.attn_processors == before


def test_refusals_leave_the_pipeline_alone() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    pipe = pipelines.build("sd15")
    steering = pipe.set_attn_processor(Uniform())
    for bad in [(), ([],), (Uniform(), AttnProcessor()), (None, Uniform()), (Uniform(attnsteer.Where(layers=99)),)]:
        with pytest.raises(SteeringError):
            pipe.set_attn_processor(*bad)
    with pytest.raises(SteeringError, match="cfg"):
        pipe.set_attn_processor(AttnProcessor(), cfg=("cond", "uncond"))
    assert attached_to(pipe) is steering


def test_what_fails_while_setting_leaves_the_old_steering_at_work() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    pipe = pipelines.build("sd15")
    plain = picture(pipe)
    stock = dict(pipe.unet.attn_processors)
    steering = pipe.set_attn_processor(Uniform())
    steered = picture(pipe)
    with pytest.raises(SteeringError, match="no order of a guided batch"):
        pipe.set_attn_processor(PAG(), cfg=("a", "b"))
    with pytest.raises(ValueError, match="number of processors"):
        pipe.set_attn_processor({"nowhere": AttnProcessor()})
    misnamed = {name.replace("mid", "top"): AttnProcessor() for name in reversed(stock)}
    misnamed = {name.replace("up_blocks", "side_blocks"): processor for name, processor in misnamed.items()}
    with pytest.raises(KeyError):  # the library finds out half-way
        pipe.set_attn_processor(misnamed)
    assert pipe.unet.attn_processors == stock
    assert attached_to(pipe) is steering
    assert np.array_equal(picture(pipe), steered)
    pipe.set_attn_processor(None)
    assert pipe.unet.attn_processors == stock
    assert np.array_equal(picture(pipe), plain)


ORDERS = {
    "attnsteer first": "import attnsteer; from diffusers import DiffusionPipeline",
    "diffusers first": "from diffusers import DiffusionPipeline; import attnsteer",
    "lazily": "import attnsteer, diffusers; import diffusers.pipelines; from diffusers import DiffusionPipeline",
}


@pytest.mark.parametrize(  # a new interpreter each; the third takes the way of the first in more steps
    "order", ["attnsteer first", "diffusers first", pytest.param("lazily", marks=pytest.mark.slow)]
)
def test_either_import_order_gives_the_method(order: str) -> None:
    code = f"""{ORDERS[order]}
import sys
assert DiffusionPipeline.set_attn_processor.__module__ == "attnsteer.pipelines"
assert not any(type(f).__module__.startswith("attnsteer") for f in sys.meta_path)
assert "exec_module" not in vars(sys.modules["diffusers.pipelines.pipeline_utils"].__spec__.loader)
"""
    subprocess.run([sys.executable, "-c", code], check=True)

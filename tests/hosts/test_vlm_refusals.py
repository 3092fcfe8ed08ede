"""What a language model refuses, with the same reasons in ``attach`` and in ``explain``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

import attnsteer
from attnsteer import AttentionCall, Processor, SteeringError, Where
from attnsteer.capture import Capture
from attnsteer.edits import Edit, KeyBias, MeanValue, Mix, Scale
from attnsteer.processors.vhd import VHD
from attnsteer.processors.vhr import VHR
from tests.hosts.common import ScaleAll, scaled, state_of
from tests.tiny import denoisers, vlms


@dataclass(frozen=True)
class Guides(ScaleAll):
    """A guidance method that would also find sites in a language model."""

    lanes = ("perturbed",)


def _refused(model: Any, *processors: Processor) -> list[str]:
    """The reasons of ``attach``, which leaves no trace; ``explain`` must give the same."""
    before = state_of(model)
    with pytest.raises(SteeringError) as error:
        attnsteer.attach(model, *processors)
    assert attnsteer.explain(model, *processors).refused == error.value.reasons
    assert state_of(model) == before
    return error.value.reasons


def test_a_method_that_guides_is_refused() -> None:
    model, _ = vlms.build("llava")
    (reason,) = _refused(model, Guides())
    assert "Guides guides by a perturbed prediction" in reason


@pytest.mark.parametrize("steps", [3, [3], slice(0, 2), (0.5, 1.0), (0.0, 0.5), {"sigma": (0.1, 1.0)}])
def test_steps_of_a_schedule_are_refused(steps: Any) -> None:
    model, _ = vlms.build("llava")
    (reason,) = _refused(model, ScaleAll(Where(steps=steps)))
    assert reason.startswith(f"ScaleAll has steps={steps!r}")
    assert "'all', 'prefill' or 'decode'" in reason


def test_two_kinds_of_removal_are_refused_unless_one_is_off() -> None:
    model, _ = vlms.build("llava")
    (reason,) = _refused(model, VHR(removal="delete"), VHD(removal="mask"))
    assert "cannot share one image-free pass" in reason
    with attnsteer.steer(model, VHR(alpha=1.0), VHD(removal="mask")) as steering:
        assert steering.explain().refused == []


def test_all_reasons_come_at_once() -> None:
    model, _ = vlms.build("llava")
    assert len(_refused(model, Guides(Where(steps=[1])), VHR(), VHD(removal="mask"))) == 3


def test_only_language_models_compare_prompts_with_and_without_an_image() -> None:
    model, _ = denoisers.build("flux")
    steering = attnsteer.attach(model, Capture(Where(layers=[0]), rows=(0,)))
    with steering, pytest.raises(SteeringError, match="give a language model"):
        steering.measure({})


# ---- logits that change behind our back ------------------------------------------------------------------------------
def _softcapped() -> tuple[Any, Tensor]:
    """A Gemma 2, whose eager attention squeezes its logits by a tanh."""
    torch.manual_seed(0)
    config = Gemma2Config(**vlms.TEXT, head_dim=vlms.HEAD_DIM, attn_logit_softcapping=0.5, attn_implementation="eager")
    return Gemma2ForCausalLM(config).eval(), torch.randint(7, vlms.VOCABULARY, (2, 9))


@dataclass(frozen=True)
class Asks(Processor):
    """Reacts with one edit."""

    edit: Any = None
    kinds = ("causal",)
    token_agnostic = True

    def react(self, call: AttentionCall) -> Edit:
        return self.edit(call)


WEIGHT = torch.linspace(0, 2, vlms.HEADS)[None]


@pytest.mark.parametrize(
    "processor",
    [
        Capture(rows="last", columns="all"),
        Asks(edit=lambda call: KeyBias(torch.ones(1, 1, call.k.shape[2]))),
        Asks(edit=lambda call: Mix(MeanValue(), WEIGHT / 2)),
    ],
    ids=["capture", "bias", "mean"],
)
def test_maps_of_capped_logits_are_neither_read_nor_edited(processor: Processor) -> None:
    model, ids = _softcapped()
    with attnsteer.steer(model, processor), pytest.raises(SteeringError, match="changes its logits by softcap"):
        model(ids)


def test_head_outputs_of_capped_logits_are_edited_exactly() -> None:
    model, ids = _softcapped()
    plain = model(ids).logits
    with attnsteer.steer(model, Asks(edit=lambda call: Scale(WEIGHT))):
        steered = model(ids).logits
    with scaled(model, {site.name: WEIGHT for site in attnsteer.sites(model)}):
        expected = model(ids).logits
    torch.testing.assert_close(steered, expected)
    assert (steered - plain).abs().max() > 1e-3

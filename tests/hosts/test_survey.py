"""The survey: a plain reading of the prompt before a generation, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, KeyBias, Processor, Site, SteeringError, Where
from attnsteer.capture import probabilities
from attnsteer.processors.gift import GIFT
from attnsteer.processors.vhr import VHR
from tests.hosts.common import GREEDY, BoostImage, Look, factors_of, state_of
from tests.tiny import denoisers, vlms


@dataclass(frozen=True)
class ReadLast(Processor):
    """Leaves the last row's plain probabilities of every layer that it sees, and which site it saw how often."""

    needs = ("question",)
    kinds = ("causal",)
    reads_only = True

    def react(self, call: AttentionCall) -> None:
        assert call.phase == "prefill"
        assert not call.lanes
        call.state["seen"] = call.state.get("seen", 0) + 1
        call.shared.setdefault("count", []).append((call.site.layer, call.state["seen"]))
        call.shared[call.site.layer] = probabilities(call, slice(-1, None), slice(None))
        call.shared["question"] = call.spans.question  # type: ignore[union-attr]


@dataclass(frozen=True)
class Surveys(Processor):
    """Needs layer 3 before layer 0: a bias of ``strength`` on the first key, and notes what it was handed."""

    strength: float = 1.0
    notes: Any = None
    reader: Processor = ReadLast(Where(layers=[2, 3]))
    kinds = ("causal",)
    last_row_only = True

    def survey(self, sites: Sequence[Site]) -> Processor:
        return self.reader

    def react(self, call: AttentionCall) -> KeyBias:
        if self.notes is not None:
            self.notes.append((call.site.layer, call.phase, dict(call.shared)))
        assert 3 in call.shared
        bias = torch.zeros(call.q.shape[0], 1, call.k.shape[2])
        bias[..., 0] = self.strength
        return KeyBias(bias, queries="last")


@dataclass(frozen=True)
class ReadPictures(ReadLast):
    needs = ()
    kinds = ("joint",)


@dataclass(frozen=True)
class SurveysPictures(Surveys):
    reader: Processor = ReadPictures()
    kinds = ("joint",)


def plain_rows(model: Any, inputs: dict[str, Any]) -> dict[int, Tensor]:
    """The last rows of a plain forward."""
    rows: dict[int, Tensor] = {}
    with attnsteer.steer(model, Look(see=lambda c: rows.update({c.site.layer: probabilities(c, [-1], slice(None))}))):
        model(**inputs)
    return rows


@pytest.mark.parametrize("name", vlms.NAMES)
def test_the_survey_reads_the_plain_prompt_once_and_serves_earlier_layers(name: str) -> None:
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    rows = plain_rows(model, inputs)
    before, random = state_of(model), torch.get_rng_state()
    notes: list[Any] = []
    with attnsteer.steer(model, Surveys(Where(layers=[0]), notes=notes), BoostImage()):
        model.generate(**inputs, **GREEDY)
    assert [(layer, phase) for layer, phase, _ in notes] == [(0, "prefill")] + [(0, "decode")] * 4
    for _, _, shared in notes:
        assert shared["count"] == [(2, 1), (3, 1)]
        for layer in (2, 3):
            torch.testing.assert_close(shared[layer], rows[layer], rtol=1e-4, atol=1e-5)
        behind = shared["question"].sum(1).tolist()
        assert behind == [vlms.QUESTION, vlms.QUESTION - vlms.SHORTER]
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, make(2, left_padding=True)[key]) for key, value in inputs.items())


def test_what_was_read_of_one_prompt_does_not_reach_the_next() -> None:
    model, make = vlms.build("llava")
    first, second = make(1), make(1, seed=1)
    rows = [plain_rows(model, given)[3] for given in (first, second)]
    notes: list[Any] = []
    with attnsteer.steer(model, Surveys(Where(layers=[0]), notes=notes)):
        for given in (first, second, first):
            model(**given)
    for (_, _, shared), expected in zip(notes, [rows[0], rows[1], rows[0]], strict=True):
        torch.testing.assert_close(shared[3], expected)
        assert shared["count"] == [(2, 1), (3, 1)]


def test_the_users_cache_is_not_touched() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    with attnsteer.steer(model, Surveys(Where(layers=[0], steps="decode"))):
        out = model(**inputs)
    plain = model(**inputs)
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    assert torch.equal(out.logits, plain.logits)
    for mine, theirs in zip(out.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)


def test_equal_surveys_are_read_once_and_others_in_the_same_pass() -> None:
    model, make = vlms.build("llava")
    passes: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    notes: list[Any] = []
    other = Surveys(Where(layers=[1]), notes=notes, reader=ReadLast(Where(layers=[3])))
    equal = [Surveys(Where(layers=[0]), strength=s, notes=notes) for s in (1.0, 2.0)]
    with attnsteer.attach(model, variants=[[equal[0]], [equal[1], other]]):
        model(**make(2))
    assert len(passes) == 2  # the survey and the user's own
    assert [shared["count"] for _, _, shared in notes] == [[(2, 1), (3, 1)]] * 2 + [[(3, 1)]]


def test_a_method_with_an_image_free_lane_keeps_its_choice() -> None:
    model, make = vlms.build("llava")
    inputs = make(2)
    with attnsteer.steer(model, VHR()) as steering:
        model(**inputs)
        alone = factors_of(steering)
    with attnsteer.steer(model, VHR(), GIFT(token_selector="all")) as steering:
        model(**inputs)
        assert all(torch.equal(factor, alone[name]) for name, factor in factors_of(steering).items())


def test_an_image_without_pixels_is_refused() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    out = model(**inputs)
    del inputs["pixel_values"]
    out.past_key_values.crop(-1)
    with attnsteer.steer(model, Surveys()):
        with pytest.raises(SteeringError, match=r"no pixels were given\.$"):
            model(**inputs)
        with pytest.raises(SteeringError, match=r"use attnsteer.prefill"):
            model.generate(**inputs, past_key_values=out.past_key_values)


def test_explain_and_refusals_know_surveys() -> None:
    model, _ = vlms.build("llava")
    found = attnsteer.explain(model, GIFT(token_selector="all"), VHR())
    assert found.extra_rows == 3
    assert "one plain pass" in found.extra
    assert "GIFT chooses" not in found.extra
    for processor in (GIFT(), GIFT(token_selector=lambda texts: [True for _ in texts])):
        with pytest.raises(SteeringError, match="GazeShift reads the words .* give processor="):
            attnsteer.attach(model, processor)
    with pytest.raises(SteeringError, match="marker='A:' and 'B:' cannot both"):
        attnsteer.attach(model, *(GIFT(token_selector="all", marker=marker) for marker in ("A:", "B:")))
    assert attnsteer.explain(model, GIFT(alpha=0)).refused == []


def test_surveys_are_for_language_models() -> None:
    model, _ = denoisers.build("flux")
    with pytest.raises(SteeringError, match="SurveysPictures surveys the prompt, which is for language models"):
        attnsteer.attach(model, SurveysPictures())

"""PAINT: token sets from the class token of the vision tower, and the logits that they raise."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.kernels import reference
from attnsteer.processors.pai import PAI
from attnsteer.processors.paint import PAINT, summary_tokens, token_sets
from tests.calls import repeated
from tests.hosts.common import GREEDY, state_of
from tests.processors.prompts import IMAGE, PADS, N, image_and_real, prompt_call, run, solo
from tests.tiny import vlms


# ---- token sets ------------------------------------------------------------------------------------------------------
def test_the_outlier_rule_by_hand() -> None:
    """Q1 2.75, Q3 6.25, limit 11.5."""
    assert summary_tokens(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 100])).tolist() == [False] * 7 + [True]
    assert summary_tokens(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 11.5])).tolist() == [False] * 8
    assert summary_tokens(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 11.6])).tolist() == [False] * 7 + [True]


def test_sets_are_disjoint_and_per_row() -> None:
    torch.manual_seed(0)
    local, summary = torch.rand(3, 576), torch.rand(3, 576) ** 8
    loc, out = token_sets(local, summary, 0.25)
    assert not (loc & out).any()
    for b in range(3):
        low, high = (float(torch.quantile(summary[b], p)) for p in (0.25, 0.75))
        expected = {j for j in range(576) if float(summary[b, j]) > high + 1.5 * (high - low)}
        assert set(torch.nonzero(out[b])[:, 0].tolist()) == expected
        best = sorted(range(576), key=lambda j, b=b: -float(local[b, j]))[:144]  # type: ignore[misc]
        assert set(torch.nonzero(loc[b])[:, 0].tolist()) == set(best) - expected
        assert 0 < int(loc[b].sum()) < 144 or not expected
    assert not token_sets(local, summary, 0.0)[0].any()


# ---- logits ----------------------------------------------------------------------------------------------------------
def scores(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    first, last = (torch.rand(3, IMAGE, generator=generator) for _ in range(2))
    last[:, 2] = 9.0  # the one outlier of each row
    return {"cls_attention": (first, last)}


def test_the_last_row_equals_the_loops() -> None:
    torch.manual_seed(1)
    call, paint = prompt_call(), PAINT(alpha=0.5, beta=0.25, local_ratio=0.5)
    call.state.update(scores())
    image, _ = image_and_real()
    first = call.state["cls_attention"][0]
    logits = reference.logits(call.q, call.k, mask=call.mask)
    for b in range(3):
        start = int(torch.nonzero(image[b])[0])
        local = set(first[b].topk(int(0.5 * IMAGE)).indices.tolist()) - {2}
        for h in range(logits.shape[1]):
            for patch in range(IMAGE):
                gain = 0.25 if patch == 2 else 0.5 if patch in local else 0.0
                logits[b, h, -1, start + patch] += gain * logits[b, h, -1, start + patch].abs()
    expected = torch.softmax(logits, -1) @ repeated(call.v, call)
    out = run(paint, call)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    assert torch.equal(out[:, :, :-1], call.output[:, :, :-1])


def test_all_tokens_local_is_pai() -> None:
    torch.manual_seed(2)
    call = prompt_call()
    flat = torch.ones(3, IMAGE)
    call.state["cls_attention"] = (flat, flat)  # no outlier
    assert torch.equal(run(PAINT(alpha=0.5, beta=0.9, local_ratio=1.0), call), run(PAI(alpha=0.5), call))


def test_rows_equal_solo_runs() -> None:
    torch.manual_seed(3)
    call, paint = prompt_call(), PAINT(local_ratio=0.5)
    call.state.update(scores())
    whole = run(paint, call)
    for row, pad in enumerate(PADS):
        state = {"cls_attention": tuple(score[row : row + 1] for score in scores()["cls_attention"])}
        torch.testing.assert_close(solo(paint, call, row, state), whole[row, :, pad:], atol=1e-12, rtol=0)


def test_a_prompt_without_picture_is_left_alone() -> None:
    assert PAINT().react(prompt_call()) is None


def test_alpha_of_the_paper_warns() -> None:
    with pytest.warns(UserWarning, match="repetitive"):
        PAINT(alpha=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PAINT()


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"beta": 1.5}, {"local_ratio": 2.0}])
def test_wrong_parameters(wrong: dict[str, float]) -> None:
    with pytest.raises(SteeringError, match=f"{next(iter(wrong))}="):
        PAINT(**wrong)


# ---- the vision tower ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_row_of_the_class_token_is_that_of_the_explicit_maps(implementation: str) -> None:
    model, make = vlms.build("llava")
    model.set_attn_implementation({"": "sdpa", "vision_config": implementation, "text_config": implementation})
    inputs = make(3, left_padding=True)
    model(**inputs)  # transformers hangs hooks of its own at first
    before, paint = state_of(model), PAINT(Where(layers="all"))
    with attnsteer.steer(model, paint) as steering:
        model(**inputs)
        found = [state["cls_attention"] for state in steering.states(paint).values()]
    assert state_of(model) == before
    tower, _ = vlms.build("llava")
    tower.set_attn_implementation("eager")
    maps = tower.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    for first, last in found:  # (prompts, pictures of each, patches)
        torch.testing.assert_close(first, maps[0][:, :, 0, 1:].sum(1)[:, None], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(last, maps[-2][:, :, 0, 1:].sum(1)[:, None], rtol=1e-5, atol=1e-6)


def test_local_tokens_follow_the_picture_of_their_row() -> None:
    """The same prompt with two pictures: what is raised differs, and follows the picture when rows are swapped."""
    model, make = vlms.build("llava")
    inputs = make(2)
    inputs["input_ids"][1] = inputs["input_ids"][0]
    paint = PAINT(Where(layers="all"), alpha=0.5)
    with attnsteer.steer(model, paint) as steering:
        model.generate(**inputs, **GREEDY, num_beams=2)
        gain = next(iter(steering.states(paint).values()))["gain"]
        model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
        swapped = next(iter(steering.states(paint).values()))["gain"]
    assert torch.equal(gain, swapped.flip(0))
    assert not torch.equal(swapped[0], swapped[1])


def test_prompts_of_no_one_and_two_pictures_share_a_batch() -> None:
    """Each row as it is alone; in the row of two pictures each picture has the tokens that it has alone."""
    model, make = vlms.build("llava")
    inputs, paint = make(3), PAINT(Where(layers="all"), local_ratio=0.5)
    ids = inputs["input_ids"]
    image = ids[0] == vlms.IMAGE
    rows = [ids[:1, ~image], ids[1:2], torch.cat([ids[2:], ids[2:, 1:]], 1)]
    pixels = [None, inputs["pixel_values"][:1], inputs["pixel_values"][1:]]
    longest = rows[2].shape[1]
    together = torch.cat([torch.nn.functional.pad(r, (longest - r.shape[1], 0), value=vlms.PAD) for r in rows])
    given = {"input_ids": together, "attention_mask": (together != vlms.PAD).long()}
    with attnsteer.steer(model, paint) as steering:

        def gain(call: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            logits = model(**call).logits[:, -1]
            return logits, next(iter(steering.states(paint).values())).get("gain")

        logits, gains = gain({**given, "pixel_values": inputs["pixel_values"]})
        for n, (row, seen) in enumerate(zip(rows, pixels, strict=True)):
            alone, own = gain({"input_ids": row} if seen is None else {"input_ids": row, "pixel_values": seen})
            torch.testing.assert_close(logits[n : n + 1], alone, rtol=1e-4, atol=1e-5)
            if own is not None:
                assert torch.equal(gains[n, : own.shape[1]], own[0])
        singles = [gain({"input_ids": ids[:1], "pixel_values": one[None]})[1] for one in pixels[2]]
        assert torch.equal(torch.cat(singles, 1), gains[2:])
    with_zeros = {**given, "pixel_values": inputs["pixel_values"]}
    assert not torch.allclose(model(**with_zeros).logits[2, -1], logits[2])
    assert torch.equal(model(**with_zeros).logits[0, -1], logits[0])


def test_pictures_without_pixels_are_refused() -> None:
    model, make = vlms.build("llava")
    inputs = make(2)
    seen = {"image": model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    with attnsteer.steer(model, PAINT()), pytest.raises(SteeringError, match="give pixels"):
        model(**inputs, mm_encoder_outputs=seen)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("qwen25", "has none"), ("smolvlm", "has none"), ("llava_next", "tiles"), ("internvl", "merges four patches")],
)
def test_towers_that_cannot_be_read_are_refused(name: str, reason: str) -> None:
    model, _ = vlms.build(name)
    with pytest.raises(SteeringError, match=reason):
        attnsteer.attach(model, replace(PAINT(), beta=0.0))


def test_a_call_without_pictures_is_plain() -> None:
    model, make = vlms.build("llava")
    ids = make(1)["input_ids"]
    text = ids[ids != vlms.IMAGE][None]
    plain = model(input_ids=text).logits
    with attnsteer.steer(model, PAINT()):
        assert torch.equal(model(input_ids=text).logits, plain)
    assert text.shape[1] < N

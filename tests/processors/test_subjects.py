"""ConsiStory's masks from the run itself and its query blending: by hand, against loops, and on pipelines."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import Capture, SteeringError, Where
from attnsteer.config import processor_from_dict
from attnsteer.edits import Replace, Segments
from attnsteer.lending import of_rows
from attnsteer.nursing import Moment
from attnsteer.processors import PAG, SharedSelfAttention
from attnsteer.site import Site
from attnsteer.steps import StepEnd
from attnsteer.stories import to_grid
from attnsteer.subjects import map_sites, refresh
from tests.calls import story_call
from tests.engine.common import latents, to_double
from tests.tiny import pipelines

UP = Where("up_blocks*.attn1")
PROMPTS = ["a dog and a red car", "a red car and a dog"]
DOG = SharedSelfAttention(UP, frames=2, anchors=1, words=("dog",), dropout=0.0)


def site(name: str, kind: Any) -> Site:
    return Site(name, kind, 0, 0, 3, 3, 8)


# ---- masks -----------------------------------------------------------------------------------------------------------
def test_masks_are_otsu_of_the_mean_over_layers_and_the_last_steps_united_over_words():
    """Two stories of three pictures, two anchors, both branches in the batch; three steps, of which two count."""
    states: dict[Site, dict[str, Any]] = {site("one", "self"): {"grid": (1, 4, 6)}, site("two", "self"): {}}
    watched = [site("cross 1", "cross"), site("cross 2", "cross")]
    states |= {s: {} for s in watched}
    mine = [True, True, True, False, False, False]
    columns = {0: [(1, 2), (4,)], 1: [(3,), (5, 6)]}

    def find(words: Any, picture: int, keys: int) -> list[tuple[int, ...]]:
        assert (words, keys) == ((("dog",), ("car",)), 9)
        return columns[picture]

    steps = [[torch.rand(12, 6, 9) for _ in watched] for _ in range(3)]
    for i, maps in enumerate(steps):
        for s, one in zip(watched, maps, strict=True):
            states[s].update(map=one, plane=(2, 3))
        end = StepEnd(Moment(i, 3), mine, lambda batch: slice(6, 12), find)
        refresh(states, end, (("dog",), ("car",)), frames=3, anchors=2, window=2)
        assert not any("map" in state for state in states.values())
    tokens, real = states[site("one", "self")]["subjects"]
    assert tokens.shape[:2] == real.shape[:2] == (2, 2)
    for anchor in range(2):
        expected = torch.zeros(24, dtype=torch.bool)
        for word in columns[anchor]:
            mean = torch.zeros(6)
            for maps in steps[1:]:
                for one in maps:
                    mean += sum(one[6 + anchor, :, c] for c in word) / len(word) / 4
            expected |= to_grid(mean.view(1, 2, 3), (1, 4, 6))[0]
        assert set(tokens[0, anchor][real[0, anchor]].tolist()) == set(expected.nonzero().flatten().tolist())
    assert not real[1].any()  # somebody else's rows
    assert "subjects" not in states[site("two", "self")]


@pytest.mark.parametrize("cfg", [True, False])
def test_the_first_step_is_plain_and_gives_the_second_its_masks(cfg):
    pipe = to_double(pipelines.build("sd15"))
    options: dict[str, Any] = {"batch": 2, "cfg": cfg, "prompt": PROMPTS, "steps": 2}
    plain = latents(pipe, "sd15", **options)
    look = Capture(Where(steps=[0]), columns="all", rows="all", reduce="heads")
    with attnsteer.steer(pipe, DOG, look) as steering:
        refreshed = latents(pipe, "sd15", **options)
        maps = Capture.collect(steering.states(look))
    watched = [maps[site.name][0] for site in map_sites(attnsteer.sites(pipe))]  # (B, 1, n, text keys) each
    place = pipe.tokenizer(PROMPTS[0]).input_ids.index(pipe.tokenizer("dog").input_ids[1])
    mean = torch.stack(watched).mean(0)[-2, 0, :, place].view(1, 3, 5)  # the first of the two conditional rows
    by_hand = SharedSelfAttention(Where("up_blocks*.attn1", steps=[1]), frames=2, anchors=1, masks=mean, dropout=0.0)
    with attnsteer.steer(pipe, by_hand):
        expected = latents(pipe, "sd15", **options)
    torch.testing.assert_close(refreshed, expected, atol=1e-10, rtol=0)
    assert (refreshed - plain).abs().max() > 1e-6


def test_stories_with_masks_of_their_own_equal_each_story_alone():
    pipe = to_double(pipelines.build("sd15"))
    prompts, method = [*PROMPTS, "the dog", "a dog"], replace(DOG, dropout=0.5)
    noise = torch.randn(4, *latents(pipe, "sd15", batch=1, steps=1).shape[1:], dtype=torch.float64)

    def run(rows: list[int], variants: list[Any]) -> Tensor:
        chosen = {"prompt": [prompts[i] for i in rows], "latents": noise[rows]}
        with attnsteer.attach(pipe, variants=variants):
            return latents(pipe, "sd15", batch=len(rows), steps=3, **chosen)

    together = run([0, 1, 2, 3], [method] * 4)
    for rows in ([0, 1], [2, 3]):
        torch.testing.assert_close(together[rows], run(rows, [method] * 2), atol=1e-9, rtol=1e-9)
    mixed = run([0, 1, 2, 3], [None, None, method, method])
    torch.testing.assert_close(mixed[2:], together[2:], atol=1e-9, rtol=1e-9)
    assert torch.equal(mixed[:2], run([0, 1, 2, 3], [None] * 4)[:2])


# ---- query blending --------------------------------------------------------------------------------------------------
def test_the_weights_of_the_plain_queries():
    """50 steps: .9, .8837, .8673, .8510, .8347, .8184, then none."""
    method = SharedSelfAttention(frames=2, queries=(0.9, 0.81836735))
    call, found = story_call(2, (1, 3, 5), step=1), []
    for i in range(50):
        if method.plain_first(Moment(i, 50)):
            method.note(call, Moment(i, 50))
            found.append(round(call.state["plain"][1][0, 0].item(), 4))
    assert found == [0.9, 0.8837, 0.8673, 0.851, 0.8347, 0.8184]
    replaced, shared = method.react(call)
    assert isinstance(replaced, Replace)
    assert isinstance(shared, Segments)
    assert not SharedSelfAttention(frames=2).plain_first(Moment(1, 50))


def seen(pipe: Any, run: Any) -> list[tuple[Any, Any, Tensor]]:
    """Arguments and prediction of every call of the denoiser."""
    calls: list[tuple[Any, Any, Tensor]] = []
    handle = pipe.unet.register_forward_hook(lambda m, a, k, out: calls.append((a, k, out[0])), with_kwargs=True)
    run()
    handle.remove()
    return calls


def queries_of(layers: list[Any], change: Any, run: Any) -> tuple[list[Tensor], Tensor]:
    """What the query projections gave in a run in which their outputs are ``change``d, and its prediction."""
    found: list[Tensor] = []

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        found.append(out)
        return change(len(found) - 1, out)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    out = run()
    for handle in handles:
        handle.remove()
    return found, out


def test_blended_queries_equal_those_of_two_forwards_by_hand():
    pipe = to_double(pipelines.build("sd15"))
    method = SharedSelfAttention(Where("up_blocks*.attn1", steps=slice(1, None)), frames=2, dropout=0.0)
    with attnsteer.steer(pipe, replace(method, queries=(0.9, 0.8))):
        calls = seen(pipe, lambda: latents(pipe, "sd15", batch=2, steps=20))
    assert len(calls) == 22  # twice in steps 1 and 2; in step 0 nothing is shared
    chosen = [s for s in attnsteer.sites(pipe) if s.name.startswith("up_blocks") and s.kind == "self"]
    layers = [pipe.unet.get_submodule(s.name).to_q for s in chosen]
    for weight, plain, real in ((0.85, calls[1], calls[2]), (0.8, calls[3], calls[4])):

        def run(call: Any) -> Tensor:
            return pipe.unet(*call[0], **call[1])[0]

        queries, out = queries_of(layers, lambda i, own: own, partial(run, plain))
        torch.testing.assert_close(out, plain[2], atol=1e-10, rtol=0)

        def blend(i: int, own: Tensor, weight: float = weight, queries: list[Tensor] = queries) -> Tensor:
            return weight * queries[i] + (1 - weight) * own

        with attnsteer.steer(pipe.unet, replace(method, where=UP)):
            expected = queries_of(layers, blend, partial(run, real))[1]
        torch.testing.assert_close(real[2], expected, atol=1e-8, rtol=0)  # weights are float32


def test_weight_zero_of_the_plain_queries_changes_no_bit():
    pipe = pipelines.build("sd15")
    method = SharedSelfAttention(Where("up_blocks*.attn1", steps=slice(1, None)), frames=2)
    found = []
    for queries in (None, (0.0, 0.0), (0.9, 0.8)):
        with attnsteer.steer(pipe, replace(method, queries=queries)):
            found.append(latents(pipe, "sd15", batch=2, steps=10))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_everything_goes_with_guidance_and_leaves_no_trace():
    pipe = to_double(pipelines.build("sd15"))
    options: dict[str, Any] = {"batch": 2, "steps": 10, "prompt": PROMPTS}
    plain, method = latents(pipe, "sd15", **options), replace(DOG, queries=(0.9, 0.8))
    with attnsteer.steer(pipe, method, PAG(Where(layers=[1]))):
        guided = latents(pipe, "sd15", **options)
        assert torch.equal(latents(pipe, "sd15", **options), guided)
    with attnsteer.steer(pipe, method):
        assert (latents(pipe, "sd15", **options) - guided).abs().max() > 1e-6
    assert torch.equal(latents(pipe, "sd15", **options), plain)
    edit = Replace(torch.randn(4, 3, 5, 2), torch.rand(1, 3))
    part = of_rows(edit, (3, 2), torch.tensor([3, 2]), 4)
    assert torch.equal(part.query, edit.query[[3, 2]])


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"words": ("dog",), "masks": torch.ones(2, 4, 4)}, "not both"),
        ({"words": "dog"}, "a tuple of words"),
        ({"window": 0}, "window=0"),
        ({"queries": (0.5,)}, "two weights"),
        ({"queries": (0.5, 2)}, "two weights"),
    ],
    ids=str,
)
def test_bad_parameters_are_named(bad, message):
    with pytest.raises(SteeringError, match=message):
        SharedSelfAttention(**bad)


def test_words_that_cannot_be_found_are_refused():
    pipe = pipelines.build("sd15")
    with attnsteer.steer(pipe, DOG), pytest.raises(SteeringError, match="'dog' is not in the prompt"):
        latents(pipe, "sd15", batch=2, prompt=["a red car", "a dog"])
    with pytest.raises(SteeringError, match="cross-attention"):
        attnsteer.attach(pipelines.build("sd3"), replace(DOG, where=Where(layers=[1])))
    pixart = pipelines.build("pixart")
    with (
        attnsteer.steer(pixart, replace(DOG, where=Where(layers=[1]))),
        pytest.raises(SteeringError, match="is not known"),
    ):
        latents(pixart, "pixart", batch=2, prompt=PROMPTS)


def test_configurations_survive_json():
    for method in (DOG, replace(DOG, words=((2, 3), "dog"), queries=(0.9, 0.8))):
        assert processor_from_dict(json.loads(json.dumps(method.to_dict()))) == method

"""HeadHunter on tiny pipelines: batches, forks, prompts, resuming, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.hosts import denoisers
from attnsteer.hosts.base import intercept
from attnsteer.hosts.worlds import models_of
from attnsteer.processors import PAG, SEG, SoftPAG
from attnsteer.search import Head, HeadHunter, Selection, generations, painter
from attnsteer.search.headhunter import Progress
from attnsteer.search.painter import Job
from attnsteer.search.selection import where_of
from tests.engine.common import Nudge
from tests.tiny import pipelines

from .common import CALLS, PAIRS, hunter, pipe, redness


def scores_of(search: HeadHunter) -> dict[tuple[int, Head], float]:
    return {(r.number, head): score for r in search.history for head, score in r.scores.items() if score is not None}


@pytest.mark.parametrize("name", ["sd3", "flux", "sd15"])
def test_batched_and_one_by_one_give_the_same_selection(name: str) -> None:
    options: dict[str, Any] = {"where": Where(heads=[0, 2])} if name != "sd15" else {"where": Where(layers=[0, 2, -1])}
    batched, single = hunter(name, batch=7, **options), hunter(name, batch=1, **options)
    assert batched.run().rounds == single.run().rounds
    one, other = scores_of(batched), scores_of(single)
    assert one.keys() == other.keys()
    # 8-bit pictures: rounding of 1e-6 before may move a pixel by one
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=0, atol=2e-2)
    assert np.std(list(one.values())) > 0.05, "the objective must tell heads apart for this test to say anything"


@pytest.mark.parametrize("name", ["sd3", "flux", "sd15"])
def test_a_score_is_the_mean_over_pairs_of_pictures_made_with_softpag_by_hand_without_guidance(name: str) -> None:
    search = hunter(name, rounds=2)
    search.run()
    first = search.history[0].chosen
    for number, heads in ((1, [search.pool[3]]), (2, [*first, next(h for h in search.pool if h not in first)])):
        found = []
        for prompt, seed in PAIRS:
            cfg = {"true_cfg_scale" if name == "flux" else "guidance_scale": 1.0}
            generator = torch.Generator().manual_seed(seed)
            with attnsteer.steer(pipe(name), SoftPAG(where_of(heads), strength=1.0, scale=3.0)):
                image = pipe(name)(prompt, generator=generator, num_inference_steps=2, **CALLS[name], **cfg).images[0]
            found += redness([image], [prompt])
        assert search.history[number - 1].scores[heads[-1]] == pytest.approx(np.mean(found), abs=2e-2)


def test_the_same_search_twice_is_the_same_bit_for_bit() -> None:
    one, two = hunter(), hunter()
    assert one.run() == two.run()
    assert scores_of(one) == scores_of(two)


def test_as_many_pictures_are_scored_as_the_formula_says_each_with_its_full_prompt() -> None:
    asked: list[tuple[bytes, str]] = []

    def count(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        assert all(image.mode == "RGB" and image.size == (80, 48) for image in images)
        asked.extend((image.tobytes(), prompt) for image, prompt in zip(images, prompts, strict=True))
        return redness(images, prompts)

    search = hunter(objective=count)
    found = search.run()
    assert len(search.pool) == 12
    assert len(asked) == generations(12, 2, 2, 2) == 44
    assert {prompt for _, prompt in asked} == {"a dog", "a red car"}
    assert sum(prompt == "a dog" for _, prompt in asked) == 22
    assert len(found.heads) == len(set(found.heads)) == 4


def test_with_w_0_all_heads_tie_and_the_first_come_first() -> None:
    calls: list[int] = []

    def counted(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        calls.append(len(images))
        return redness(images, prompts)

    search = hunter(objective=counted, scale=0.0, k=2, rounds=3)
    assert search.run().heads == tuple(search.pool[:6])
    assert all(len(set(found.scores.values())) == 1 for found in search.history)
    assert sum(calls) == len(PAIRS), "a search that changes nothing needs one picture for each pair"


def test_batches_fork_at_the_first_perturbed_layer_and_no_batch_is_smaller_than_the_others() -> None:
    batches: list[list[Job]] = []
    search = hunter(batch=8, rounds=1)
    paint = search.painter.__class__.__call__

    class Watched(search.painter.__class__):  # type: ignore[name-defined, misc]
        def __call__(self, jobs: Sequence[Job]) -> list[Any]:
            batches.append(list(jobs))
            return paint(self, jobs)

    search.painter.__class__ = Watched
    search.run()
    layers = [[int(job.heads[0].layer) for job in jobs] for jobs in batches]
    flat = [layer for batch in layers for layer in batch]
    assert flat == sorted(flat)
    assert {len(batch) for batch in layers} == {8}
    assert sum(len(set(batch)) > 1 for batch in layers) <= 3, "at most one batch for each border between layers"


def painted(search: HeadHunter, jobs: Sequence[Job], name: str = "sd3", stage: int = 0) -> tuple[list[Any], list[int]]:
    """The pictures, and the rows of the first tensor in every call of a stage."""
    (model,) = models_of(pipe(name))
    rows: list[int] = []

    def note(call: Any, args: Any, kwargs: Any) -> Any:
        rows.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).shape[0])
        return call(*args, **kwargs)

    restore = intercept(denoisers.stages(model, denoisers.family_of(model))[stage][1], note)
    pictures = search.painter(jobs)
    restore()
    return pictures, rows


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_the_first_forward_computes_one_row_for_each_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    search = hunter(name)
    jobs = [Job((head,), prompt, seed) for prompt, seed in PAIRS for head in search.pool[:3]]
    once, rows = painted(search, jobs, name, -1)
    assert rows[0] == len(PAIRS)
    assert rows.count(len(jobs)) == 2 * search.painter.steps - 1, "the other forwards, perturbed or not, have all rows"
    monkeypatch.setattr(painter, "first_forward_once", lambda pipe, kinds: nullcontext())
    for one, other in zip(once, search.painter(jobs), strict=True):
        apart = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
        assert apart.max() <= 1, "of 255, by the rounding of another batch size"


@pytest.mark.parametrize("case", ["guidance", "as many tokens as rows", "a method that edits the plain rows"])
def test_nothing_is_shared_where_rows_cannot_be_told_or_differ(case: str) -> None:
    tokens = 3 * 5  # of a picture of 48 x 80
    options = {"call": CALLS["sd3"] | {"guidance_scale": 3.0}} if case == "guidance" else {}
    search = hunter(**options)
    jobs = [Job((head,), "a dog", 0) for head in (search.pool * 2)[: tokens if "tokens" in case else 3]]
    if "method" in case:
        search.painter.processor = replace(Nudge(), where=search.painter.processor.where)
    assert painted(search, jobs)[1][0] == len(jobs) * (2 if case == "guidance" else 1)


def test_an_error_while_the_first_forward_is_shared_leaves_nothing() -> None:
    search, (model,) = hunter(), models_of(pipe())
    before = {name: dict(vars(module)) for name, module in model.named_modules()}

    def fail(call: Any, args: Any, kwargs: Any) -> Any:
        raise ValueError("no")

    restore = intercept(denoisers.stages(model, denoisers.family_of(model))[-1][1], fail)
    with pytest.raises(ValueError, match="no"):
        search.painter([Job((head,), "a dog", 0) for head in search.pool[:3]])
    restore()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name


def test_every_prompt_is_encoded_once_and_the_pipeline_is_left_as_it_was() -> None:
    search = hunter()
    encoders = [getattr(pipe(), name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    calls: list[int] = []
    hooks = [e.register_forward_hook(lambda _m, args, _o: calls.append(args[0].shape[0])) for e in encoders]
    before = dict(vars(pipe())), [dict(e.__dict__) for e in encoders]
    search.run()
    assert calls == [1] * 6, "two prompts, three encoders"
    assert before == (dict(vars(pipe())), [dict(e.__dict__) for e in encoders])
    assert attnsteer.attach(pipe(), SoftPAG()).detach() is None
    for hook in hooks:
        hook.remove()


def test_an_exception_leaves_the_pipeline_as_it_was() -> None:
    def fails(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        raise RuntimeError("no")

    before = dict(vars(pipe())), dict(pipe().text_encoder.__dict__)
    with pytest.raises(RuntimeError, match="no"):
        hunter(objective=fails).run()
    assert before == (dict(vars(pipe())), dict(pipe().text_encoder.__dict__))
    attnsteer.attach(pipe(), SoftPAG()).detach()


def test_a_finished_search_is_read_and_more_rounds_or_pairs_only_add(tmp_path: Path) -> None:
    first = hunter(out=tmp_path)
    found = first.run()
    lines = (tmp_path / "scores-0.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 44
    again = hunter(out=tmp_path)
    assert again.run() == found
    assert again.resumed == 44
    more = hunter(out=tmp_path, rounds=3)
    longer = more.run()
    assert longer.prefix(2).rounds == found.rounds
    assert more.resumed == 44
    keys = [json.loads(line) for line in (tmp_path / "scores-0.jsonl").read_text().splitlines()]
    scored = [(str(k["set"]), k["prompt"], k["seed"]) for k in keys if "set" in k]
    assert len(scored) == len(set(scored)) == 44 + 8 * 2
    assert Selection.load(tmp_path / "heads.json") == longer


def other(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return [-value for value in redness(images, prompts)]


CHANGES: dict[str, dict[str, Any]] = {
    "strength": {"strength": 0.5},
    "scale": {"scale": 2.0},
    "steps": {"steps": 3},
    "window": {"where": Where(steps=(0.0, 0.5))},
    "call": {"call": CALLS["sd3"] | {"guidance_scale": 2.0}},
    "objective": {"objective": other},
    "method": {"processor": SEG()},
    "pairs": {"pairs": [("a cat", 0)]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_settings_never_meet_old_scores(change: str, tmp_path: Path) -> None:
    first = hunter(out=tmp_path, rounds=1)
    first.run()
    second = hunter(out=tmp_path, **{"rounds": 1, **CHANGES[change]})
    second.run()
    assert second.resumed == 0


def test_scores_of_an_objective_with_unknown_content_are_for_one_search_alone(tmp_path: Path) -> None:
    def make(sign: Any) -> Any:
        return lambda images, prompts: [sign * x for x in redness(images, prompts)]

    class Sign:
        __slots__ = ()

        def __rmul__(self, x: float) -> float:
            return x

        __mul__ = __rmul__

    first = hunter(objective=make(Sign()), out=tmp_path, rounds=1)
    first.run()
    first.run()
    assert first.resumed == 24, "the same search goes on"
    second = hunter(objective=first.objective, out=tmp_path, rounds=1)
    second.run()
    assert second.resumed == 0
    known = [hunter(objective=make(sign), out=tmp_path, rounds=1) for sign in (1.0, -1.0, 1.0)]
    found = [search.run().heads for search in known]
    assert [search.resumed for search in known] == [0, 0, 24]
    assert found[0] == found[2] != found[1]


def test_another_model_never_meets_old_scores(tmp_path: Path) -> None:
    first = hunter(out=tmp_path, rounds=1)
    first.run()
    changed = pipelines.build("sd3")
    with torch.no_grad():
        changed.transformer.transformer_blocks[1].attn.to_v.weight *= 1.01
    options: dict[str, Any] = {"k": 2, "rounds": 1, "steps": 2, "batch": 5, "call": CALLS["sd3"], "out": tmp_path}
    second = HeadHunter(changed, redness, PAIRS, **options)
    second.run()
    assert second.resumed == 0
    third = HeadHunter(pipelines.build("sd3"), redness, PAIRS, **options)
    third.run()
    assert third.resumed == 24, "the same weights in another object"


def test_the_pool_follows_where_and_the_kinds_of_the_method() -> None:
    assert hunter().pool == [Head(layer, head) for layer in range(4) for head in range(3)]
    some = hunter(where=Where(layers=[1, 3], heads=[0, 2]))
    assert some.pool == [Head(1, 0), Head(1, 2), Head(3, 0), Head(3, 2)]
    assert set(some.run().heads) == set(some.pool)
    unet = hunter("sd15", where=Where(layers="*attn1"))
    kinds = {site.kind for site in attnsteer.sites(pipe("sd15")) if site.layer in {h.layer for h in unet.pool}}
    assert "self" in kinds
    named = hunter("sd15", where=Where(layers="*attn2"), processor=_cross())
    assert all(isinstance(head.layer, str) and head.layer.endswith("attn2") for head in named.pool)


def _cross() -> Any:
    class Cross(SoftPAG):
        kinds = ("self", "cross")

    return Cross(strength=1.0)


def test_another_method_may_be_searched() -> None:
    search = hunter(processor=PAG(scale=2.0), rounds=1)
    assert search.painter.processor == PAG(scale=2.0)
    assert len(search.run().heads) == 2


def test_progress_counts_every_picture_and_knows_the_time_left() -> None:
    seen: list[Progress] = []
    hunter(progress=seen.append).run()
    assert [now.done for now in seen] == sorted(now.done for now in seen)
    assert seen[-1].done == seen[-1].total == 44
    assert seen[-1].seconds_left == 0
    assert {now.what for now in seen} == {"round 1 of 2", "round 2 of 2"}
    assert all(now.seconds_left and now.seconds_left > 0 for now in seen if 0 < now.done < 24)


def test_a_thresholded_search_ends_where_nothing_passes(tmp_path: Path) -> None:
    from attnsteer.search import Thresholded

    search = hunter(objective=Thresholded(redness, [(brightness, 1e6)]), out=tmp_path)
    found = search.run()
    assert found.rounds == ((),)
    assert Selection.load(tmp_path / "heads.json") == found
    with pytest.raises(SteeringError, match="no heads"):
        SoftPAG.from_search(tmp_path / "heads.json")


def brightness(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no pairs": ({"pairs": []}, "nothing to search on"),
    "pairs are a string": ({"pairs": "a dog"}, "is no list"),
    "no pair": ({"pairs": ["a dog"]}, r"'a dog' is no pair: give \(prompt, seed\) pairs"),
    "a seed below 0": ({"pairs": [("a dog", -1)]}, "is no pair"),
    "a pair twice": ({"pairs": [("a dog", 1), ("a dog", 1)]}, "given twice"),
    "k": ({"k": 0}, "k=0 is out of range"),
    "too many heads": ({"k": 5, "rounds": 3}, "15 heads, but there are only 12"),
    "strength": ({"strength": 2.0}, r"strength=2.0\) is out of range"),
    "steps": ({"steps": 0}, "steps=0 is out of range"),
    "batch": ({"batch": 0}, "batch=0 is out of range"),
    "layer": ({"where": Where(layers=9)}, "Layer 9 does not exist"),
    "no objective": ({"objective": 3}, "objective=3 cannot be called"),
    "no argument": ({"call": {"hight": 64}}, "'hight': ...} is no argument of StableDiffusion3Pipeline"),
    "our argument": ({"call": {"prompt": "x"}}, "is set by the search"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_searched_is_refused_in_one_sentence_before_anything_runs(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(SteeringError, match=message) as caught:
        hunter(**options)
    assert "\n" not in str(caught.value)


def test_targets_that_cannot_be_searched_are_refused() -> None:
    with pytest.raises(SteeringError, match="needs a Diffusers pipeline, not SD3"):
        HeadHunter(pipe().transformer, redness, PAIRS)
    with attnsteer.steer(pipe(), SoftPAG()), pytest.raises(SteeringError, match="detach it first"):
        hunter()
    with pytest.raises(SteeringError, match="makes no pictures"):
        HeadHunter(
            pipelines.build("wan"),
            redness,
            PAIRS,
            k=1,
            rounds=1,
            steps=1,
            call={"num_frames": 1, "height": 48, "width": 80},
        ).run()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda images, prompts: 1.0, "wanted is one number each"),
        (lambda images, prompts: [1.0], "wanted is one number each"),
        (lambda images, prompts: ["x"] * len(images), "wanted is one number each"),
        (lambda images, prompts: [float("nan")] * len(images), "gave nan: a search needs finite scores"),
    ],
)
def test_objectives_that_give_no_scores_are_refused(given: Any, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        hunter(objective=given).run()

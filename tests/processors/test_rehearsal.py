"""Masks of words from a plain run: the same maps by hand, and the way from them into the methods."""

from __future__ import annotations

import pytest
import torch

import attnsteer
from attnsteer import Capture, SteeringError, Where
from attnsteer.maps import otsu
from attnsteer.processors import IRDiffusion, SharedSelfAttention
from attnsteer.rehearsal import rehearse
from tests.engine.common import latents
from tests.tiny import pipelines

PROMPTS = ["a dog", "a red car", "a dog and a red car"]
WORDS = [["dog"], ["red car"], ["dog", "red car"]]


def call(name: str, prompts: int = 3, **options: object) -> dict[str, object]:
    kwargs = pipelines.call_kwargs(name, prompts, **options)
    kwargs.pop("prompt")
    return {**kwargs, "output_type": "latent"}


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart"])
def test_masks_equal_those_of_the_captured_maps(name, cfg):
    pipe = pipelines.build(name)
    masks = rehearse(pipe, PROMPTS, WORDS, **call(name, cfg=cfg))
    with attnsteer.steer(pipe, Capture(columns="all", rows="all", reduce="heads")) as steering:
        pipe(PROMPTS, **call(name, cfg=cfg))
        maps = Capture.collect(steering.states(steering.processors[0]))
    # the conditional rows come last; the lowest resolution is next to a quarter of the latent's
    total = sum(x.sum(0)[-3:, 0] for x in maps.values() if x.shape[-2] == 15)
    for row, (prompt, words) in enumerate(zip(PROMPTS, WORDS, strict=True)):
        ids = pipe.tokenizer(prompt).input_ids
        scaled = []
        for word in words:
            spelled = pipe.tokenizer(word).input_ids
            spelled = [i for i in spelled if i not in pipe.tokenizer.all_special_ids]
            start = next(i for i in range(len(ids)) if ids[i : i + len(spelled)] == spelled)
            one = total[row, :, start : start + len(spelled)].mean(1)
            scaled.append((one - one.min()) / (one.max() - one.min()))
        assert masks[row].shape == (len(words), 3, 5)
        best = torch.stack(scaled).argmax(0)
        for i, one in enumerate(scaled):
            assert torch.equal(masks[row][i].flatten(), otsu(one) & (best == i))


@pytest.mark.parametrize("cfg", [True, False])
def test_one_prompt_alone_has_the_masks_that_it_has_among_others(cfg):
    pipe = pipelines.build("sd15")
    (alone,) = rehearse(pipe, PROMPTS[2:], WORDS[2:], **call("sd15", 1, cfg=cfg))
    among, _ = rehearse(pipe, PROMPTS[:0:-1], WORDS[:0:-1], **call("sd15", 2, cfg=cfg))
    assert torch.equal(alone, among)


def test_a_word_that_is_given_twice_means_each_of_its_occurrences():
    pipe = pipelines.build("sd15")
    both = call("sd15", 1)
    (masks,) = rehearse(pipe, ["a red dog and a blue dog"], [["dog", "dog"]], **both)
    (named,) = rehearse(pipe, ["a red dog and a blue dog"], [["dog"]], **both)
    assert masks.shape == (2, 3, 5)
    assert not torch.equal(masks[0], masks[1])
    assert not any(torch.equal(each, named[0]) for each in masks)
    with pytest.raises(SteeringError, match="named 2 times, but is in the prompt 1 times"):
        rehearse(pipe, ["a dog"], [["dog", "dog"]], **both)


def test_from_a_rehearsal_into_the_methods():
    pipe = pipelines.build("sd15")
    masks = rehearse(pipe, PROMPTS, WORDS, **call("sd15"))
    plain = latents(pipe, "sd15", batch=3, prompt=PROMPTS)
    how = IRDiffusion(references=torch.cat(masks[:2]), scene=masks[2], start_layer=0)
    for method in (how, SharedSelfAttention(frames=3, masks=torch.cat(masks[:2]))):
        with attnsteer.steer(pipe, method):
            found = latents(pipe, "sd15", batch=3, prompt=PROMPTS)
        assert not torch.equal(found[2], plain[2])


def test_a_rehearsal_leaves_the_pipeline_as_it_was():
    pipe = pipelines.build("sd15")
    before = latents(pipe, "sd15", batch=3, prompt=PROMPTS)
    rehearse(pipe, PROMPTS, WORDS, **call("sd15"))
    assert torch.equal(latents(pipe, "sd15", batch=3, prompt=PROMPTS), before)


def test_wrong_input_is_refused():
    pipe = pipelines.build("sd15")
    with pytest.raises(SteeringError, match="'bird' is not in the prompt; its tokens are .* 2 'red</w>', 3 'car</w>'"):
        rehearse(pipe, PROMPTS, [["dog"], ["bird"], ["car"]], **call("sd15"))
    with pytest.raises(SteeringError, match="words for each; got 3 and 1"):
        rehearse(pipe, PROMPTS, [["dog"]])
    with pytest.raises(SteeringError, match="one picture for each prompt"):
        rehearse(pipe, PROMPTS, WORDS, **call("sd15"), num_images_per_prompt=2)
    with pytest.raises(SteeringError, match="with a tokenizer"):
        rehearse(pipe.unet, PROMPTS, WORDS)
    with pytest.raises(SteeringError, match="no cross attention"):
        rehearse(pipelines.build("sd3"), PROMPTS, WORDS)
    with pytest.raises(SteeringError):
        rehearse(pipe, PROMPTS, WORDS, Where(steps=[7]), **call("sd15"))

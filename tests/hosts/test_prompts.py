"""Words of the prompt among the text keys: pieces, repetitions, several text encoders, and prompts without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnsteer
from attnsteer import SteeringError, Where
from attnsteer.hosts.prompts import PromptWatch, Reading, place, readings
from attnsteer.nursing import LevelMaps, Moment, TokenMaps
from attnsteer.processors import AStar, AttendAndExcite, Conform, ConsistentSelfAttention, Focus, SynGen
from attnsteer.spans import find_each
from tests.nursed import LEVEL, PROMPTS, generate
from tests.tiny import pipelines, tokenizers


def watch_of(name: str, **call: Any) -> PromptWatch:
    """A watch that has seen one call of a tiny pipeline."""
    watch = PromptWatch(pipelines.build(name))
    watch.pipe.encode_prompt(device=torch.device("cpu"), **call)
    return watch


def groups(*words: Any) -> Any:
    return tuple((word,) if isinstance(word, (str, tuple)) else tuple(word) for word in words)


@pytest.mark.parametrize("make", [tokenizers.clip, tokenizers.t5, tokenizers.qwen2])
def test_each_occurrence_is_found_with_all_its_pieces(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer("a zebra and a dog, dog").input_ids
    assert len(find_each(tokenizer, ids, "dog")) == 2
    (zebra,) = find_each(tokenizer, ids, "Zebra")
    assert len(zebra) >= 5
    assert zebra == tuple(range(zebra[0], zebra[0] + len(zebra)))
    assert find_each(tokenizer, ids, "zeb") == []


def test_a_word_named_once_is_all_its_occurrences_and_named_as_often_each_its_own() -> None:
    tokenizer = tokenizers.clip()
    ids = tokenizer("a red dog and a blue dog").input_ids
    assert place(tokenizer, ids, (("dog",),)) == (((3, 7),),)
    assert place(tokenizer, ids, (("red", "dog"), ("blue", "dog"))) == (((2,), (3,)), ((6,), (7,)))
    assert place(tokenizer, ids, (("blue dog",),)) == (((6, 7),),)
    with pytest.raises(SteeringError, match="'dog' is named 3 times, but is in the prompt 2 times"):
        place(tokenizer, ids, (("dog",), ("dog",), ("dog",)))


def test_a_missing_word_is_an_error_with_the_tokens() -> None:
    tokenizer = tokenizers.clip()
    with pytest.raises(SteeringError, match="'cat' is not in the prompt; its tokens are .* 2 'dog</w>'"):
        place(tokenizer, tokenizer("a dog").input_ids, (("cat",),))


def test_unets_read_all_keys_but_the_first_and_the_last_or_the_words_alone() -> None:
    watch = watch_of("sd15", prompt="a dog and car", num_images_per_prompt=1, do_classifier_free_guidance=True)
    family = "UNet (SD 1.x, SD 2.x, SDXL)"
    (found,) = readings(watch, family, (0, 1), groups("dog", "car"), 16, True)
    assert found == Reading(tuple(range(1, 15)), (((1,),), ((3,),)), (0, 2))
    (found,) = readings(watch, family, (0, 1), groups("dog", "car"), 16, False)
    assert found == Reading((1, 2, 3, 4), (((1,),), ((3,),)), (0, 2))


def test_sd3_has_the_words_twice_and_flux_in_t5_alone() -> None:
    call = {"prompt": "a dog and car", "prompt_2": None, "prompt_3": None, "max_sequence_length": 12}
    clip, t5 = readings(watch_of("sd3", **call), "SD3, SD3.5", (0, 1), groups("dog", "car"), 28, False)
    assert clip.columns == (1, 2, 3, 4)
    assert t5.columns == (16, 17, 18, 19)
    assert clip.groups == t5.groups == (((1,),), ((3,),))
    call = {"prompt": "nothing", "prompt_2": "a dog and car", "max_sequence_length": 12}
    (found,) = readings(watch_of("flux", **call), "FLUX", (0, 1), groups("dog", "car"), 12, False)
    assert found.columns == (0, 1, 2, 3)


def test_an_encoder_whose_prompt_is_cut_off_before_every_word_is_left_out() -> None:
    call = {"prompt": "a dog and car", "prompt_2": None, "prompt_3": None, "max_sequence_length": 1}
    (clip,) = readings(watch_of("sd3", **call), "SD3, SD3.5", (0, 1), groups("dog", "car"), 17, False)
    assert clip.columns == (1, 2, 3, 4)
    with pytest.raises(SteeringError, match="'bird' is not in the prompt; its tokens are 0 '<|startoftext|>'"):
        readings(watch_of("sd3", **call), "SD3, SD3.5", (0, 1), groups("bird"), 17, False)
    call |= {"max_sequence_length": 4}  # the dog, but not the car
    (clip,) = readings(watch_of("sd3", **call), "SD3, SD3.5", (0, 1), groups("dog", "car"), 20, False)
    assert clip.columns == (1, 2, 3, 4)


LONG = "a dog on the grass the bird the blue the grass the bird the blue car and the dog"
"""More than the 16 tokens that CLIP reads, which end before the car."""


def test_words_behind_the_length_of_clip_are_read_from_t5_alone() -> None:
    call = {"prompt": LONG, "prompt_2": None, "prompt_3": None, "max_sequence_length": 64}
    watch = watch_of("sd3", **call)
    (t5,) = readings(watch, "SD3, SD3.5", (0, 1), groups("dog", "car"), 80, False)
    ids = watch.pipe.tokenizer_3(LONG).input_ids
    assert [[[16 + i for i in word] for word in group] for group in t5.groups] == [
        [[16 + i for one in find_each(watch.pipe.tokenizer_3, ids, word) for i in one]] for word in ("dog", "car")
    ]
    assert t5.columns == tuple(range(16, 16 + len(ids) - 1)), "without the end"
    (t5,) = readings(watch, "SD3, SD3.5", (0, 1), groups("dog", "dog"), 80, False)  # CLIP reads one of both
    assert t5.columns[0] == 16
    pipe = pipelines.build("sd3")
    with attnsteer.attach(pipe, AStar(subjects=("dog", "car"), level=0, scale_factor=2.0)):
        found = generate(pipe, "sd3", LONG, max_sequence_length=64)
    assert not torch.equal(found, generate(pipe, "sd3", LONG, max_sequence_length=64))


def test_a_word_that_no_encoder_reads_is_said_to_be_cut_off() -> None:
    call = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    watch, family = watch_of("sd15", prompt=LONG, **call), "UNet (SD 1.x, SD 2.x, SDXL)"
    with pytest.raises(SteeringError, match="'car' is cut off: the 16 tokens that are read .* 2 'dog</w>'"):
        readings(watch, family, (0, 1), groups("dog", "car"), 16, False)
    with pytest.raises(SteeringError, match="'cat' is not in the prompt; its tokens are .*'car</w>'"):
        readings(watch, family, (0, 1), groups("dog", "cat"), 16, False)
    with pytest.raises(SteeringError, match="'bird' is named 3 times, but is in the prompt 2 times"):
        readings(watch, family, (0, 1), groups("bird", "bird", "bird"), 16, False)


def test_keys_of_an_encoder_that_is_missing_are_not_read() -> None:
    """SD3 fills them with zeros; the tokenizer may still be there."""
    pipe = pipelines.build("sd3")
    pipe.text_encoder_3 = None
    watch = PromptWatch(pipe)
    call = {"prompt": "a dog and car", "prompt_2": None, "prompt_3": None, "max_sequence_length": 12}
    embeds = pipe.encode_prompt(device=torch.device("cpu"), **call)[0]
    assert not embeds[:, 16:].any()
    pipe.text_encoder = None  # some loops free it once the prompt is encoded: its keys are words all the same
    (clip,) = readings(watch, "SD3, SD3.5", (0, 1), groups("dog", "car"), 28, False)
    assert clip.columns == (1, 2, 3, 4)


def test_pictures_of_several_prompts_have_their_own_words() -> None:
    watch = watch_of(
        "sd15", prompt=["a dog", "the blue dog"], num_images_per_prompt=2, do_classifier_free_guidance=True
    )
    assert watch.samples == 4
    family = "UNet (SD 1.x, SD 2.x, SDXL)"
    found = [readings(watch, family, (row, 4), groups("dog"), 16, False)[0].groups[0][0] for row in range(4)]
    assert found == [(1,), (1,), (2,), (2,)]


def test_twin_encoders_with_different_prompts_are_refused() -> None:
    call = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    watch = watch_of("sdxl", prompt="a dog", prompt_2="a car", **call)
    with pytest.raises(SteeringError, match="prompt and prompt_2 differ"):
        readings(watch, "UNet (SD 1.x, SD 2.x, SDXL)", (0, 1), groups("dog"), 16, False)


def test_positions_must_exist_and_cover_an_encoder() -> None:
    family = "UNet (SD 1.x, SD 2.x, SDXL)"
    with pytest.raises(SteeringError, match="there are 16 text keys, 0 to 15"):
        readings(None, family, (0, 1), groups((20,)), 16, False)
    call = {"prompt": "a dog and car", "prompt_2": None, "prompt_3": None, "max_sequence_length": 12}
    with pytest.raises(SteeringError, match="name each word there, or none"):
        readings(watch_of("sd3", **call), "SD3, SD3.5", (0, 1), groups((2,), (17,)), 28, False)
    (found,) = readings(watch_of("sd3", **call), "SD3, SD3.5", (0, 1), groups((17,), (19,)), 28, False)
    assert found.groups == (((1,),), ((3,),))


def test_the_negative_prompt_of_a_second_call_is_not_taken_for_the_prompt() -> None:
    pipe = pipelines.build("flux")
    watch = PromptWatch(pipe)
    call = {"prompt_2": None, "max_sequence_length": 12}
    pipe.encode_prompt(prompt="before", **call)
    pipe.check_inputs("a dog", None, 48, 80)
    pipe.encode_prompt(prompt="a dog", **call)
    pipe.encode_prompt(prompt="the negative", **call)
    assert watch.prompt("prompt_2", 0, 1) == "a dog"
    watch.detach()
    assert not {"check_inputs", "encode_prompt"} & set(vars(pipe))


def test_each_run_of_a_hand_written_loop_has_its_own_prompt() -> None:
    pipe = pipelines.build("sd15")

    def loop(prompt: str) -> torch.Tensor:
        pipe.scheduler.set_timesteps(2)
        embeds, negative = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt="a dog")
        x = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0))
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                a, b = (pipe.unet(x, t, each).sample for each in (embeds, negative))
            x = pipe.scheduler.step(b + 2 * (a - b), t, x).prev_sample
        return x

    method = AStar(subjects=("dog", "car"), level=0, scale_factor=2.0)
    with attnsteer.steer(pipe, method):
        loop("a dog and a red car")
        second = loop("a red car and a blue dog")
        with pytest.raises(SteeringError, match="'dog' is not in the prompt"):
            loop("a red car")
    with attnsteer.steer(pipe, method):
        assert torch.equal(second, loop("a red car and a blue dog"))


def test_every_run_of_a_hand_written_loop_is_checked() -> None:
    """Also where nobody asks for the words of the prompt, and after a refusal."""
    pipe = pipelines.build("sd15")

    def loop(pictures: int) -> None:
        pipe.scheduler.set_timesteps(2)
        embeds, _ = pipe.encode_prompt(["a dog", "a car"], "cpu", pictures, False)
        x = torch.randn(len(embeds), 4, 6, 10)
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                x = pipe.scheduler.step(pipe.unet(x, t, embeds).sample, t, x).prev_sample

    with attnsteer.steer(pipe, ConsistentSelfAttention(Where(layers="all"), frames=2)):
        for _ in range(2):
            loop(1)
            for _ in range(2):
                with pytest.raises(SteeringError, match="num_images_per_prompt=2 puts the pictures of one prompt"):
                    loop(2)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_a_pipeline_says_which_word_is_missing(name: str) -> None:
    pipe = pipelines.build(name)
    with (
        attnsteer.attach(pipe, AStar(subjects=("dog", "bird"), level=LEVEL[name])),
        pytest.raises(SteeringError, match="'bird' is not in the prompt; its tokens are"),
    ):
        generate(pipe, name)


def test_embeddings_instead_of_a_prompt_need_positions() -> None:
    pipe = pipelines.build("sd15")
    embeds, negative = pipe.encode_prompt(PROMPTS[0], torch.device("cpu"), 1, True, "the blue photo")
    given = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with attnsteer.attach(pipe, AStar(subjects=("dog", "car"), level=0, scale_factor=2.0)):
        expected = generate(pipe, "sd15", PROMPTS[0])
        with pytest.raises(SteeringError, match="got embeddings instead of a prompt: give tokens="):
            generate(pipe, "sd15", PROMPTS[0], **given)
    with attnsteer.attach(pipe, AStar(tokens=((2,), (6,)), level=0, scale_factor=2.0)):
        found = generate(pipe, "sd15", PROMPTS[0], **given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_embeddings_do_not_say_which_keys_are_words() -> None:
    family = "UNet (SD 1.x, SD 2.x, SDXL)"
    (found,) = readings(None, family, (0, 1), groups((2,), (6,)), 16, False)
    assert found == Reading((2, 6), (((0,),), ((1,),)), None)
    (found,) = readings(None, family, (0, 1), groups((2,), (6,)), 16, True)
    assert found.columns == tuple(range(1, 15))


@pytest.mark.parametrize("method", [AttendAndExcite, AStar, Conform, SynGen])
def test_methods_that_compare_with_the_other_words_refuse_embeddings(method: Any) -> None:
    """The start, the end and the padding of the prompt would be taken for words."""
    maps = {None: LevelMaps(torch.rand(2, 3, 5), 1)}
    mine = {SynGen: {"include_entities": True}, Conform: {"softmax": True}}.get(method, {})
    steer = method(tokens=((2,), (6,)), level=0, **mine)
    with pytest.raises(SteeringError, match="the other words of the prompt, and embeddings do not say"):
        steer.loss([TokenMaps(maps, (((0,),), ((1,),)), None)], None, Moment(0, 1))
    steer.loss([TokenMaps(maps, (((0,),), ((1,),)), ())], None, Moment(0, 1))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_methods_that_look_at_the_subjects_alone_take_embeddings(name: str) -> None:
    pipe = pipelines.build(name)
    given = {"max_sequence_length": 16}
    extra = {"do_classifier_free_guidance": False} if name == "sd3" else {}
    names = {"sd3": ("prompt_embeds", None, "pooled_prompt_embeds"), "flux": ("prompt_embeds", "pooled_prompt_embeds")}
    second = {"sd3": {"prompt_2": None, "prompt_3": None}, "flux": {"prompt_2": None}}[name]
    parts = pipe.encode_prompt(PROMPTS[0], device=torch.device("cpu"), **second, **given, **extra)
    embeds = {key: part for key, part in zip(names[name], parts, strict=False) if key}
    first = 16 if name == "sd3" else 0  # the tokens of T5
    for method in (
        Focus(tokens=((first + 1,), (first + 5,)), control="latent"),
        Conform(tokens=((first + 1,), (first + 5,))),
        AStar(tokens=((first + 1,), (first + 5,)), softmax=False),
    ):
        with attnsteer.attach(pipe, method):
            expected = generate(pipe, name, PROMPTS[0], cfg=False, **given)
            found = generate(pipe, name, PROMPTS[0], cfg=False, **given, prompt=None, **embeds)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

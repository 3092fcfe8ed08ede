"""Words of the prompt among the text keys: pieces, repetitions, several text encoders, and prompts without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnsteer
from attnsteer import SteeringError
from attnsteer.hosts.prompts import PromptWatch, Reading, place, readings
from attnsteer.processors import AStar
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
    with pytest.raises(SteeringError, match="'car' is not in the prompt"):
        readings(watch_of("sd3", **call), "SD3, SD3.5", (0, 1), groups("dog", "car"), 20, False)


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

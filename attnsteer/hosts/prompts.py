"""Which tokens of the text keys spell which words of the prompt, for the pipelines whose text layout is known."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..clock import Method
from ..errors import SteeringError
from ..nursing import Groups, Word
from ..spans import find_each


@dataclass(frozen=True)
class Encoder:
    """The text keys of one encoder of a pipeline.

    Attributes:
        tokenizer, prompt: names of its tokenizer and of its argument of ``encode_prompt``.
        twin: those of a second encoder whose embeddings lie beside the first one's on the same keys.
        adjustable: its length is ``max_sequence_length`` rather than that of its tokenizer.
    """

    tokenizer: str
    prompt: str
    twin: tuple[str, str] | None = None
    adjustable: bool = False


LAYOUTS: Mapping[str, tuple[Encoder, ...]] = {
    "UNet (SD 1.x, SD 2.x, SDXL)": (Encoder("tokenizer", "prompt", ("tokenizer_2", "prompt_2")),),
    "SD3, SD3.5": (
        Encoder("tokenizer", "prompt", ("tokenizer_2", "prompt_2")),
        Encoder("tokenizer_3", "prompt_3", None, True),
    ),
    "FLUX": (Encoder("tokenizer_2", "prompt_2", None, True),),
}
"""The encoders whose tokens stand one after another among the text keys, by family."""
ENCODERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "tokenizer_3": "text_encoder_3"}
"""The encoder of each tokenizer. Where it is missing (SD3 without T5) its keys hold zeros instead of words."""


@dataclass(frozen=True)
class Reading:
    """What is read of one picture's text keys from one encoder.

    Attributes:
        columns: positions among the text keys.
        groups: group -> word -> positions among ``columns``.
        rest: positions among ``columns`` of the other words; None where embeddings do not say which keys are words, so
            that ``columns`` has those of the groups alone.
    """

    columns: tuple[int, ...]
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    rest: tuple[int, ...] | None


class PromptWatch:
    """Remembers the prompts of a pipeline call: ``encode_prompt`` gets them once more after ``check_inputs``.

    Args:
        check: is shown the arguments of the first ``encode_prompt`` of every call, and may refuse them.

    Attributes:
        given: the arguments of the first ``encode_prompt`` of the call in progress, None before.
    """

    def __init__(self, pipe: Any, check: Callable[[Mapping[str, Any]], None] | None = None):
        self.pipe = pipe
        self._check = check
        self.given: dict[str, Any] | None = None
        self._absent: set[str] = set()
        self._fresh = True
        self._attached = True
        self._ours: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}
        for name, around in (("check_inputs", self._begin), ("encode_prompt", self._encode)):
            if hasattr(pipe, name):
                self._saved[name] = vars(pipe).get(name)
                self._ours[name] = Method(pipe, getattr(pipe, name), around(getattr(pipe, name)))
                vars(pipe)[name] = self._ours[name]

    def _begin(self, check: Any) -> Any:
        def begin(*args: Any, **kwargs: Any) -> Any:
            self._fresh = True
            return check(*args, **kwargs)

        return begin

    def _encode(self, encode: Any) -> Any:
        signature = inspect.signature(encode)

        def note(*args: Any, **kwargs: Any) -> Any:
            if self._attached and self._fresh:  # the negative prompt may be encoded by a second call
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                if self._check:
                    self._check(bound.arguments)
                self.given, self._fresh = dict(bound.arguments), False
                self._absent = {part for part in ENCODERS.values() if getattr(self.pipe, part, None) is None}
            return encode(*args, **kwargs)

        return note

    def denoising(self) -> None:
        """The denoiser runs, so the next prompt is that of another run: hand-written loops have no ``check_inputs``."""
        self._fresh = True

    @property
    def samples(self) -> int | None:
        """How many pictures the call in progress makes; None where it cannot be told."""
        given = self.given
        count = None if given is None else prompts_in(given)
        return None if given is None or count is None else count * pictures_each(given)

    def detach(self) -> None:
        self._attached = False
        for name, ours in self._ours.items():
            if vars(self.pipe).get(name) is ours:
                if self._saved[name] is None:
                    vars(self.pipe).pop(name)
                else:
                    vars(self.pipe)[name] = self._saved[name]

    # ---- prompts -----------------------------------------------------------------------------------------------------
    def prompt(self, name: str, row: int, samples: int) -> str | None:
        """The text that an encoder got for a picture; None where embeddings were given."""
        given = self.given
        if given is None or given.get("prompt") is None:
            return None
        prompts = given.get(name) or given["prompt"]
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        return listed[row * len(listed) // samples]

    def ids(self, encoder: Encoder, row: int, samples: int, cut: bool = True) -> tuple[Any, list[int]] | None:
        """The tokenizer and the token ids of a picture's prompt without padding; None where they are not known.

        ``cut=False``: also those behind the length that the encoder reads.
        """
        name, prompt_name, twin = encoder.tokenizer, encoder.prompt, encoder.twin
        if twin and getattr(self.pipe, name, None) is None:  # the refiner of SDXL has the second one only
            (name, prompt_name), twin = twin, None
        tokenizer, text = getattr(self.pipe, name, None), self.prompt(prompt_name, row, samples)
        if tokenizer is None or text is None or ENCODERS[name] in self._absent:
            return None
        if twin and self.prompt(twin[1], row, samples) != text:
            raise SteeringError(
                f"{prompt_name} and {twin[1]} differ, and their tokens lie on the same keys: words cannot be told "
                "apart. Give one prompt, or tokens= instead of words."
            )
        convert = getattr(self.pipe, "maybe_convert_prompt", None)  # textual inversion: one word, several tokens
        text = convert(text, tokenizer) if convert else text
        assert self.given is not None
        limit = self.given["max_sequence_length"] if encoder.adjustable else tokenizer.model_max_length
        return tokenizer, list(tokenizer(text, truncation=cut, max_length=limit if cut else None).input_ids)


def prompts_in(given: Mapping[str, Any]) -> int | None:
    """How many prompts the arguments of ``encode_prompt`` hold; None where it cannot be told."""
    prompts, embeds = given.get("prompt"), given.get("prompt_embeds")
    if prompts is None:
        return None if embeds is None else len(embeds)
    return 1 if isinstance(prompts, str) else len(prompts)


def pictures_each(given: Mapping[str, Any]) -> int:
    """How many pictures (or videos) are made for each of these prompts."""
    return int(given.get("num_images_per_prompt") or given.get("num_videos_per_prompt") or 1)


# ---- reading ---------------------------------------------------------------------------------------------------------
def readings(
    watch: PromptWatch | None, family: str, picture: tuple[int, int], groups: Groups, keys: int, padding: bool
) -> list[Reading]:
    """What is read for one picture, one entry for each text encoder that holds all the words (one may be cut off
    before).

    Args:
        picture: which of how many.
        keys: how many text keys there are.
        padding: all keys but the first and the last, see ``Nursing.padding``.

    Raises:
        SteeringError: a word that the prompt does not have, with the prompt's tokens; words that no encoder reads all
            of; or no prompt to look in.
    """
    found, start, known = [], 0, None
    encoders = LAYOUTS[family]
    for number, encoder in enumerate(encoders):
        if start >= keys:
            break
        spelled = watch.ids(encoder, *picture) if watch else None
        known, stop = known or (encoder if spelled else None), keys
        if watch is not None and number < len(encoders) - 1:
            stop = start + watch.pipe.tokenizer_max_length
        part = _part(spelled, groups, start, stop, padding)
        if part is not None:
            found.append(part)
        start = stop
    if not found and watch and known:
        _missing(watch, known, picture, groups)
    if not found:
        raise SteeringError(_nowhere(watch, groups, keys))
    return found


def _missing(watch: PromptWatch, encoder: Encoder, picture: tuple[int, int], groups: Groups) -> None:
    """Say which word the prompt lacks, or which one an encoder does not read any more.

    Raises:
        SteeringError: there is such a word.
    """
    spelled, whole = watch.ids(encoder, *picture), watch.ids(encoder, *picture, cut=False)
    if not spelled or not whole:
        return
    place(*whole, groups)
    lost = _lacking(*spelled, groups)
    if lost:
        raise SteeringError(
            f"The word {lost[0]!r} is cut off: the {len(spelled[1])} tokens that are read of the prompt are "
            f"{spell(*spelled)}. Say it earlier, or in fewer words."
        )


def _words(groups: Groups) -> list[str]:
    return [word.lower() for group in groups for word in group if isinstance(word, str)]


def _lacking(tokenizer: Any, ids: Sequence[int], groups: Groups) -> list[str]:
    """The words that are not there as often as the groups name them."""
    words = _words(groups)
    return [word for word in words if len(find_each(tokenizer, ids, word)) < words.count(word)]


def _part(
    spelled: tuple[Any, list[int]] | None, groups: Groups, start: int, stop: int, all_keys: bool
) -> Reading | None:
    """The reading of the text keys ``start`` to ``stop``; None where a word of the groups is not among them."""
    content: list[int] | None
    if spelled is None:
        if _words(groups):
            return None
        content = list(range(start + 1, stop - 1)) if all_keys else None
        placed = groups
    else:
        tokenizer, ids = spelled
        if _lacking(tokenizer, ids, groups):
            return None
        special = set(tokenizer.all_special_ids)
        content = [start + i for i, token in enumerate(ids) if token not in special]
        placed = place(tokenizer, ids, groups, start)
    wanted = [[[i for i in word if isinstance(i, int) and start <= i < stop] for word in group] for group in placed]
    if not any(word for group in wanted for word in group):
        return None
    if not all(word for group in wanted for word in group):
        raise SteeringError(
            f"tokens={groups!r}: the text keys {start} to {stop - 1} are those of one text encoder and hold some of "
            "the words but not all: name each word there, or none."
        )
    named = {i for group in wanted for word in group for i in word}
    columns = sorted({*(range(start + 1, stop - 1) if all_keys else content or ()), *named})
    position = {key: i for i, key in enumerate(columns)}
    return Reading(
        tuple(columns),
        tuple(tuple(tuple(position[i] for i in word) for word in group) for group in wanted),
        None if content is None else tuple(position[i] for i in content if i not in named and i in position),
    )


def _nowhere(watch: PromptWatch | None, groups: Groups, keys: int) -> str:
    if any(isinstance(word, int) for group in groups for words in group for word in words):
        return f"tokens={groups!r}: there are {keys} text keys, 0 to {keys - 1}."
    if watch is None or watch.given is None:
        return (
            "The prompt was not seen, so words cannot be found in it: attach before the pipeline is called, or give "
            "tokens= (positions) instead of words."
        )
    return "The pipeline got embeddings instead of a prompt: give tokens= (positions) instead of words."


def place(tokenizer: Any, ids: Sequence[int], groups: Groups, start: int = 0) -> Groups:
    """The groups with the positions of their tokens (from ``start``) in place of words.

    A word that the groups name once means all its occurrences; named as often as it occurs, the first mention means the
    first occurrence, and so on.

    Raises:
        SteeringError: a word that does not occur, or is named more than once but not once for each occurrence; says
            which tokens there are.
    """
    mentions = _words(groups)
    turn: dict[str, int] = {}

    def find(word: Word) -> tuple[int, ...]:
        if not isinstance(word, str):
            return word
        there = find_each(tokenizer, ids, word)
        named, name = mentions.count(word.lower()), word.lower()
        if not there or named not in (1, len(there)):
            often = (
                "not in the prompt" if not there else f"named {named} times, but is in the prompt {len(there)} times"
            )
            raise SteeringError(f"The word {word!r} is {often}; its tokens are {spell(tokenizer, ids)}.")
        turn[name] = turn.get(name, -1) + 1
        chosen = there[turn[name] : turn[name] + 1] if named > 1 else there
        return tuple(start + i for occurrence in chosen for i in occurrence)

    return tuple(tuple(find(word) for word in group) for group in groups)


def spell(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens with their positions, for messages."""
    return ", ".join(f"{i} {token!r}" for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(ids))))

"""``attnsteer maps``: where a picture is looked at for a word of its prompt, or of an answer about it."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SteeringError
from . import models
from .generate import checked_call, load_picture, pipeline_arguments
from .options import add_methods, add_model, add_selection, command, finite, positive, processors, selection

if TYPE_CHECKING:
    from ..heat import HeatMaps
    from ..where import Where

PROMPT, WORDS = "a dog and a car on a blue background", ("dog", "car")
"""What is painted, or drawn for a question, where nothing is asked for."""
QUESTION = "Please describe this image in detail."
PAINTERS = ("negative_prompt", "guidance_scale", "call", "num_steps", "steps")
READERS = ("image", "max_new_tokens", "sinks", "against", "view")
"""Options that are for one kind of model."""


def add(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "maps",
        run,
        "Heat maps: where a diffusion model looks at each word, or where an answer about a picture comes from.",
        [
            "maps world-sd",
            'maps world-sd3 --prompt "a dog and a car" --words dog car --per layer --out maps.png',
            'maps world-sd --prompt "a dog and a car" --words car --per step --layers 2 --method attend-and-excite '
            "--subjects dog,car",
            'maps world-llava --image photo.png --question "Is there a dog in the image?"',
            'maps llava-hf/llava-1.5-7b-hf --image photo.png --question "What is in the image?" --words dog '
            "--sinks drop",
        ],
    )
    add_model(parser)
    asked = f"what to paint, or the question about --image (default: {PROMPT!r}, {QUESTION!r})"
    parser.add_argument("--prompt", "--question", dest="prompt", metavar="TEXT", help=asked)
    words = "words of the prompt or of the answer (default: every word of a prompt, every token of an answer)"
    parser.add_argument("--words", nargs="+", metavar="WORD", help=words)
    out = "the sheet of maps; the arrays go beside it as .safetensors (or there alone, if FILE ends so)"
    parser.add_argument("--out", metavar="FILE", help=f"{out} (default: outputs/maps/...)")
    _add_read(parser.add_argument_group("what is read"))
    _add_painters(parser.add_argument_group("diffusion models"))
    _add_readers(parser.add_argument_group("vision-language models"))
    add_methods(parser.add_argument_group("steering of the run that is looked at"))


def _add_read(group: Any) -> None:
    kept = "kept apart, the rest is averaged; head: each head of each layer (default: average)"
    group.add_argument("--per", choices=("average", "step", "layer", "head"), default="average", help=kept)
    add_selection(group)


def _add_painters(group: Any) -> None:
    group.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    group.add_argument("--num-steps", type=positive, help="denoising steps (default: 20)")
    group.add_argument("--guidance-scale", type=finite, help="classifier-free guidance (default: the pipeline's)")
    group.add_argument(
        "--call", action="append", default=[], metavar="NAME=VALUE", help="an argument of the pipeline, e.g. height=512"
    )


def _add_readers(group: Any) -> None:
    group.add_argument("--image", metavar="FILE", help="the picture (default: a scene of the small world)")
    group.add_argument("--max-new-tokens", type=positive, help="length limit of the answer (default: 64)")
    marked = "image tokens that most rows look at, whatever they say (default: mark)"
    group.add_argument("--sinks", choices=("keep", "mark", "drop"), help=marked)
    group.add_argument("--against", metavar="TEXT", help="divide by the maps of this general question")
    group.add_argument("--view", choices=("finest", "overview"), help="of a picture cut into tiles (default: finest)")


def run(given: argparse.Namespace) -> int:
    files, pipeline = _files(given), models.is_pipeline(models.locate(given.model))
    idle = [name for name in (READERS if pipeline else PAINTERS) if getattr(given, name) not in (None, [])]
    if idle:
        kind, does = ("vision-language", "makes pictures") if pipeline else ("diffusion", "answers questions")
        option = idle[0].replace("_", "-")
        raise SteeringError(f"--{option} is for {kind} models; {given.model!r} {does}.")
    target, hf_processor = models.load(given.model, given.device, given.dtype)
    start = time.perf_counter()
    with models.running(target):
        heat = _painted(given, target) if pipeline else _answered(given, target, hf_processor)
    seconds = round(time.perf_counter() - start, 3)
    for file in files:
        heat.save(file)
    report = {"model": given.model, "seed": given.seed, "seconds": seconds, **_report(heat)}
    report["files"] = [str(file) for file in files]
    if given.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join([*([report["answer"]] if "answer" in report else []), *report["files"]]))
    return 0


def _painted(given: argparse.Namespace, pipe: Any) -> HeatMaps:
    import torch

    from ..heat import HeatMaps, heat_maps

    given.num_steps = given.num_steps or 20
    call = checked_call(given, pipe, pipeline_arguments(given))
    pipe.set_progress_bar_config(disable=given.json or not sys.stderr.isatty())
    words = _words(given) or (None if given.prompt else list(WORDS))
    generator = torch.Generator().manual_seed(given.seed)
    steering, where = _steering(given), _where(given)
    found = heat_maps(
        pipe,
        given.prompt or PROMPT,
        words,
        per=given.per,
        where=where,
        processors=steering,
        generator=generator,
        **call,
    )
    if not isinstance(found, HeatMaps):
        raise SteeringError(f"maps shows one picture; --call makes {len(found)}.")
    return found


def _answered(given: argparse.Namespace, model: Any, hf_processor: Any) -> HeatMaps:
    from ..heat import answer_maps
    from ..world import sampling

    picture = load_picture(given.image) if given.image else sampling.compose(WORDS, "blue", given.seed).image()
    limit = given.max_new_tokens or 64
    heat = answer_maps(
        model,
        hf_processor,
        picture,
        given.prompt or QUESTION,
        per=given.per,
        where=_where(given),
        sinks=given.sinks or "mark",
        against=given.against,
        view=given.view or "finest",
        processors=_steering(given),
        max_new_tokens=limit,
        streamer=_Progress(limit, given.json or not sys.stderr.isatty()),
    )
    words = _words(given)
    return heat.of(*words) if words else heat


class _Progress:
    """A bar that counts tokens as ``generate`` streams them; the prompt comes first."""

    def __init__(self, limit: int, silent: bool):
        from tqdm import tqdm

        self._bar = tqdm(total=limit, desc="tokens", disable=silent, leave=False)
        self._prompt = True

    def put(self, tokens: Any) -> None:
        self._bar.update(0 if self._prompt else 1)
        self._prompt = False

    def end(self) -> None:
        self._bar.close()


def _steering(given: argparse.Namespace) -> list[Any]:
    """The methods of the options; --layers, --heads and --steps say what is read instead."""
    own = {"layers": None, "heads": None, "steps": None}
    return processors(argparse.Namespace(**{**vars(given), **own}))


def _where(given: argparse.Namespace) -> Where | None:
    from ..plain import decode_where

    wanted = selection(given.layers, given.heads, given.steps)
    return decode_where(wanted) if wanted else None


def _words(given: argparse.Namespace) -> list[str]:
    """``--words dog,car``, ``--words dog car`` and ``--words "red car"``."""
    parts = [part.strip() for text in given.words or () for part in text.split(",")]
    if not all(parts):
        raise SteeringError(f"--words {' '.join(given.words)!r} has an empty word: write dog car.")
    return parts


def _report(heat: HeatMaps) -> dict[str, Any]:
    facts: dict[str, Any] = {"text": heat.text, "words": list(heat.words), "axes": list(heat.axes)}
    facts |= {"shape": list(heat.maps.shape), "numbers": {k: list(v) for k, v in heat.numbers.items()}}
    facts["peaks"] = [[round(x, 4), round(y, 4)] for x, y in heat.peaks]
    if heat.sinks is not None:
        facts["sinks"] = heat.sinks.nonzero().tolist()
    answer: str | None = getattr(heat, "answer", None)
    return facts if answer is None else {"answer": answer, **facts}


def _files(given: argparse.Namespace) -> list[Path]:
    """The files to write, checked before the long work."""
    from ..heat.result import PICTURES

    if given.out is None:
        name = re.sub(r"[^a-z0-9]+", "-", f"{Path(given.model).name} {given.prompt or ''}".lower()).strip("-")[:60]
        given.out = str(Path("outputs/maps") / f"{name}-{given.seed}.png")
    out = Path(given.out)
    if out.is_dir():
        raise SteeringError(f"--out {given.out!r} is a folder.")
    if out.suffix.lower() == ".safetensors":
        return [out]
    if out.suffix.lower() not in PICTURES:
        raise SteeringError(f"--out {given.out!r}: let it end in {', '.join(PICTURES)} or .safetensors.")
    return [out, out.with_suffix(".safetensors")]

"""``attnsteer generate``: pictures of a diffusion model, or an answer of a vision-language model, steered."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat import question_inputs
from ..errors import SteeringError
from . import models, several
from .options import EMBEDDED, add_model, add_processors, command, described, finite, parameter, positive

if TYPE_CHECKING:
    from ..variants import Variant

OWNED = {
    "prompt": "--prompt",
    "negative_prompt": "--negative-prompt",
    "num_inference_steps": "--num-steps",
    "guidance_scale": "--guidance-scale",
    "generator": "--seed",
    "output_type": "--out",
    "return_dict": "--json",
}
"""Arguments of the pipeline that have an option."""


def add(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "generate",
        run,
        "Generate pictures (diffusion model) or an answer about a picture (vision-language model), steered.",
        [
            'generate world-sd3 --prompt "a dog and a car" --method softpag --layers 2,3 --variants strength=.25,.5,1',
            'generate world-sd --prompt "a dog and a car" --method attend-and-excite --subjects dog,car --num-seeds 4',
            'generate world-sd --prompt "a dog" --prompt "a dog and a cat" --method consistent-self-attention',
            'generate world-sd3 --prompt "a dog" --variants my-configurations.json --out sheet.png',
            'generate world-llava --image photo.png --prompt "What is in the image?" --method vhr',
            'generate world-llava --image photo.png --prompt "What is there?" --method pai:alpha=.2+image-contrast',
        ],
    )
    add_model(parser)
    asked = "what to show, or the question about --image; several times: the pictures of a story, in one batch"
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help=asked)
    parser.add_argument("--negative-prompt", help="what not to show")
    parser.add_argument("--image", metavar="FILE", help="the picture that the question is about")
    parser.add_argument("--num-steps", type=positive, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--guidance-scale", type=finite, help="classifier-free guidance (default: the pipeline's)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="length limit of an answer (default: 128)")
    parser.add_argument(
        "--call", action="append", default=[], metavar="NAME=VALUE", help="an argument of the pipeline, e.g. height=512"
    )
    where = (
        "where the picture goes, or of several the sheet, with the pictures beside it (default: outputs/generate/...)"
    )
    parser.add_argument("--out", metavar="FILE", help=where)
    add_processors(parser)
    _add_several(parser.add_argument_group("several pictures, the plain ones first"))


def _add_several(group: Any) -> None:
    tried = "values to try, e.g. strength=.25,.5 or layers=2,3 (repeatable: every combination), or a JSON list of the"
    group.add_argument(
        "--variants",
        action="append",
        default=[],
        metavar="NAME=V,V|FILE",
        help=f"{tried} configurations that to_dict writes",
    )
    group.add_argument("--num-seeds", type=positive, default=1, metavar="N", help="seeds from --seed on (default: 1)")
    group.add_argument("--batch", type=positive, metavar="N", help="pictures at once (default: all variants of a seed)")


def run(given: argparse.Namespace) -> int:
    tried, call = several.variants(given), pipeline_arguments(given)
    picture = load_picture(given.image) if given.image else None
    _check(given, tried)
    target, hf_processor = models.load(given.model, given.device, given.dtype)
    start, wanted = time.perf_counter(), list(tried[-1].processors)
    result: dict[str, Any]
    if picture is None:
        result = paint(given, target, tried, call)
    else:
        result = {"answer": answer(target, hf_processor, picture, given.prompt[0], wanted, given.max_new_tokens)}
    report: dict[str, Any] = {"model": given.model, "prompt": given.prompt[0], "seed": given.seed}
    report |= {"prompts": given.prompt} if len(given.prompt) > 1 else {}
    report |= {"processors": [described(p) for p in wanted]} if "pictures" not in result else {}
    report |= {"seconds": round(time.perf_counter() - start, 3), **result}
    if given.json:
        print(json.dumps(report, indent=2))
    else:
        print(report.get("answer") or "\n".join([*report["files"], *([report["sheet"]] if "sheet" in report else [])]))
    return 0


def _check(given: argparse.Namespace, tried: Sequence[Variant]) -> None:
    """Refuse options that do not go with the model or with each other, before anything is loaded."""
    pipeline = models.is_pipeline(models.locate(given.model))
    if pipeline and given.image:
        raise SteeringError(f"--image is for vision-language models; {given.model!r} makes pictures.")
    if not pipeline and not given.image:
        raise SteeringError(f"{given.model!r} answers questions about a picture: give one with --image.")
    diffusion = ("negative_prompt", "guidance_scale", "call", "out", "variants", "batch")
    idle = [name for name in diffusion if getattr(given, name) not in (None, [])]
    idle += ["num_seeds"] if given.num_seeds > 1 else []
    if not pipeline and idle:
        raise SteeringError(
            f"--{idle[0].replace('_', '-')} is for diffusion models; {given.model!r} answers questions."
        )
    if not pipeline and len(given.prompt) > 1:
        raise SteeringError(f"{given.model!r} answers one question at a time: give one --prompt.")
    if len(given.prompt) > 1 and (given.num_seeds > 1 or given.batch):
        name = "--num-seeds" if given.num_seeds > 1 else "--batch"
        raise SteeringError(f"{name} is for one prompt; several are the rows of one batch, seeds counted from --seed.")
    reading = [type(p).__name__ for variant in tried for p in variant.processors if p.reads_rows]
    if reading and len(given.prompt) == 1:
        raise SteeringError(f"{reading[0]} makes pictures look at each other: give a --prompt for each of them.")


# ---- pictures --------------------------------------------------------------------------------------------------------
def paint(given: argparse.Namespace, pipe: Any, tried: Sequence[Variant], call: dict[str, Any]) -> dict[str, Any]:
    """Generate and write; one picture where one is asked for, else all with the plain ones first, and a sheet."""
    import torch

    from ..attach import steer

    call = checked_call(given, pipe, call)
    pipe.set_progress_bar_config(disable=given.json or not sys.stderr.isatty())
    out = out_file(given)
    if given.variants or given.num_seeds > 1 or len(given.prompt) > 1:
        return several.write(several.shots(given, pipe, tried, call), tried, out)
    wanted = tried[-1].processors
    with models.running(pipe), steer(pipe, *wanted) if wanted else nullcontext():
        output = pipe(prompt=given.prompt[0], generator=torch.Generator().manual_seed(given.seed), **call)
    return {"files": [str(several.save((output.images if hasattr(output, "images") else output.frames)[0], out))]}


def checked_call(given: argparse.Namespace, pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline call with what suits the model.

    Raises:
        SteeringError: one that the pipeline does not take; says which it takes.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    call = call_defaults(given.model, pipe, given.guidance_scale) | call
    unknown = sorted(set(call) - set(accepted))
    if unknown:
        raise SteeringError(f"{type(pipe).__name__} takes no {unknown[0]!r}; it takes {', '.join(list(accepted)[1:])}.")
    return call


def pipeline_arguments(given: argparse.Namespace) -> dict[str, Any]:
    """What --call and the options of their own say to the pipeline."""
    call = dict(parameter(text, "--call") for text in given.call)
    for name in call.keys() & OWNED.keys():
        raise SteeringError(f"--call {name}=... has an option of its own: {OWNED[name]}.")
    options = {name: getattr(given, name) for name in ("negative_prompt", "guidance_scale")}
    return call | {"num_inference_steps": given.num_steps} | {k: v for k, v in options.items() if v is not None}


def call_defaults(model: str, pipe: Any, guidance: float | None = None) -> dict[str, Any]:
    """What suits an embedded model; other models keep their pipeline's defaults."""
    from ..world import assets

    if model not in EMBEDDED:
        return {}
    return assets.call(type(pipe).__name__, guidance)


def out_file(given: argparse.Namespace) -> Path:
    """The file to write, checked before the long work."""
    if given.out is None:
        return Path("outputs/generate") / f"{file_name(given.prompt[0])}-{given.seed}.png"
    out = Path(given.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".gif"):
        raise SteeringError(f"--out {given.out!r} is no picture file: let it end in .png, .jpg, .webp or .gif.")
    if out.is_dir():
        raise SteeringError(f"--out {given.out!r} is a folder.")
    return out


def file_name(prompt: str) -> str:
    """What the names of a prompt's files start with."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"


# ---- answers ---------------------------------------------------------------------------------------------------------
def load_picture(file: str) -> Any:
    """A picture file as RGB.

    Raises:
        SteeringError: the file holds no picture.
        OSError: there is no such file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SteeringError(f"{file!r} is no picture that can be read: {str(error).splitlines()[0]}") from error
    except OSError as error:
        if error.filename is None:  # a broken picture, not a missing file
            raise SteeringError(f"{file!r} is no picture that can be read: {error}") from error
        raise


def answer(model: Any, processor: Any, picture: Any, question: str, wanted: list[Any], limit: int) -> str:
    """The greedy answer to a question about a picture."""
    from ..attach import steer

    if len(wanted) == 1 and wanted[0].call:  # it asks by itself
        method = replace(wanted[0], max_new_tokens=min(limit, wanted[0].max_new_tokens))
        with models.running(model):
            return str(method.answer(model, processor, picture, question).answer)
    inputs = question_inputs(processor, [picture], [question]).to(model.device, model.dtype)
    with models.running(model), steer(model, *wanted, processor=processor) if wanted else nullcontext():
        tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()

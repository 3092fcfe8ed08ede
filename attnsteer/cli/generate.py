"""``attnsteer generate``: one picture of a diffusion model, or one answer of a vision-language model, steered."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..errors import SteeringError
from . import models
from .options import EMBEDDED, add_model, add_processors, command, finite, parameter, positive, processors

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
        "Generate a picture (diffusion model) or an answer about a picture (vision-language model), steered.",
        [
            'generate world-sd3 --prompt "a dog and a car" --processor SoftPAG --layers 2,3 --param strength=.5',
            'generate world-llava --image photo.png --prompt "What is in the image?" --processor VHR',
        ],
    )
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="what to show, or the question about --image")
    parser.add_argument("--negative-prompt", help="what not to show")
    parser.add_argument("--image", metavar="FILE", help="the picture that the question is about")
    parser.add_argument("--num-steps", type=positive, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--guidance-scale", type=finite, help="classifier-free guidance (default: the pipeline's)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="length limit of an answer (default: 128)")
    parser.add_argument(
        "--call", action="append", default=[], metavar="NAME=VALUE", help="an argument of the pipeline, e.g. height=512"
    )
    parser.add_argument("--out", metavar="FILE", help="where the picture goes (default: outputs/generate/...)")
    add_processors(parser)


def run(given: argparse.Namespace) -> int:
    wanted, call = processors(given), pipeline_arguments(given)
    picture = load_picture(given.image) if given.image else None
    pipeline = models.is_pipeline(models.locate(given.model))
    if pipeline and picture is not None:
        raise SteeringError(f"--image is for vision-language models; {given.model!r} makes pictures.")
    if not pipeline and picture is None:
        raise SteeringError(f"{given.model!r} answers questions about a picture: give one with --image.")
    idle = [
        name for name in ("negative_prompt", "guidance_scale", "call", "out") if getattr(given, name) not in (None, [])
    ]
    if not pipeline and idle:
        raise SteeringError(
            f"--{idle[0].replace('_', '-')} is for diffusion models; {given.model!r} answers questions."
        )
    target, hf_processor = models.load(given.model, given.device, given.dtype)
    start = time.perf_counter()
    result: dict[str, Any]
    if pipeline:
        result = {"files": paint(given, target, wanted, call)}
    else:
        result = {"answer": answer(target, hf_processor, picture, given.prompt, wanted, given.max_new_tokens)}
    report: dict[str, Any] = {"model": given.model, "prompt": given.prompt, "seed": given.seed}
    report |= {"processors": [p.to_dict() for p in wanted], "seconds": round(time.perf_counter() - start, 3), **result}
    print(json.dumps(report, indent=2) if given.json else report.get("answer") or "\n".join(report["files"]))
    return 0


# ---- pictures --------------------------------------------------------------------------------------------------------
def paint(given: argparse.Namespace, pipe: Any, wanted: list[Any], call: dict[str, Any]) -> list[str]:
    """Generate, write the file, and give its path in a list (frames of a video make one GIF)."""
    import torch

    from ..attach import steer

    accepted = inspect.signature(type(pipe).__call__).parameters
    call = call_defaults(given.model, pipe, given.guidance_scale) | call
    call["generator"] = torch.Generator().manual_seed(given.seed)
    unknown = sorted(set(call) - set(accepted))
    if unknown:
        raise SteeringError(f"{type(pipe).__name__} takes no {unknown[0]!r}; it takes {', '.join(list(accepted)[1:])}.")
    pipe.set_progress_bar_config(disable=given.json or not sys.stderr.isatty())
    out = out_file(given)
    with models.running(pipe), steer(pipe, *wanted) if wanted else nullcontext():
        output = pipe(prompt=given.prompt, **call)
    out.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(output, "images"):
        output.images[0].save(out)
    else:
        frames = _frames(output.frames[0])
        out = out.with_suffix(".gif")
        frames[0].save(out, save_all=True, append_images=frames[1:], duration=80, loop=0)
    return [str(out)]


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
        words = re.sub(r"[^a-z0-9]+", "-", given.prompt.lower()).strip("-")[:60] or "picture"
        return Path("outputs/generate") / f"{words}-{given.seed}.png"
    out = Path(given.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".gif"):
        raise SteeringError(f"--out {given.out!r} is no picture file: let it end in .png, .jpg, .webp or .gif.")
    if out.is_dir():
        raise SteeringError(f"--out {given.out!r} is a folder.")
    return out


def _frames(frames: Any) -> list[Any]:
    from PIL import Image

    return [f if isinstance(f, Image.Image) else Image.fromarray((f * 255).round().astype("uint8")) for f in frames]


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

    inputs = question_inputs(processor, [picture], question).to(model.device, model.dtype)
    with models.running(model), steer(model, *wanted, processor=processor) if wanted else nullcontext():
        tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def question_inputs(processor: Any, pictures: list[Any], question: str) -> Any:
    """The chat prompts of one question about each picture, as tensors."""
    if getattr(processor, "chat_template", None):
        text = {"type": "text", "text": question}
        chats = [[{"role": "user", "content": [{"type": "image", "image": p}, text]}] for p in pictures]
        return processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
    prompt = f"USER: {getattr(processor, 'image_token', '<image>')}\n{question} ASSISTANT:"
    return processor(text=[prompt] * len(pictures), images=pictures, return_tensors="pt", padding=True)

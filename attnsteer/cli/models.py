"""Loading models for the command line: a folder, a hub id or an embedded model, whole or as an empty shell."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import SteeringError
from .options import EMBEDDED

Loaded = tuple[Any, Any]
"""The pipeline or model, and its Hugging Face processor (None for pipelines)."""


def locate(name: str) -> str:
    """The path of an embedded model, else the name itself."""
    if name in EMBEDDED and not Path(name).exists():
        from ..world import assets

        return str(assets.path(f"models/{name}"))
    return name


def is_pipeline(source: str) -> bool:
    """Whether this is a Diffusers pipeline (``model_index.json``); otherwise it is a transformers model.

    Raises:
        SteeringError: it is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return True
        if (folder / "config.json").is_file():
            return False
        raise SteeringError(f"The folder {source!r} holds neither a model_index.json nor a config.json.")
    if folder.exists() or source.count("/") != 1:
        raise SteeringError(f"{source!r} is no folder, no hub id (owner/name) and none of {', '.join(EMBEDDED)}.")
    return _file(source, "model_index.json") is not None


def load(name: str, device: str, dtype: str) -> Loaded:
    """The model on its device.

    Raises:
        SteeringError: no such model or device.
        OSError: files are missing or cannot be downloaded.
    """
    source = locate(name)
    pipeline = is_pipeline(source)
    place, kind = placement(device, dtype)
    if pipeline:
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        return _readable(source, lambda: DiffusionPipeline.from_pretrained(source, dtype=kind).to(place)), None
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    model = _readable(source, lambda: AutoModelForImageTextToText.from_pretrained(source, dtype=kind).to(place).eval())
    return model, _readable(source, lambda: AutoProcessor.from_pretrained(source))


def shell(name: str) -> tuple[Any, Any]:
    """What there is to steer without its weights: the denoiser and its scheduler, or the language model and None."""
    import torch

    source = locate(name)
    if not is_pipeline(source):
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = _readable(source, lambda: AutoConfig.from_pretrained(source))
        with torch.device("meta"):
            return _readable(source, lambda: AutoModelForImageTextToText.from_config(config)), None
    import diffusers

    index = json.loads(Path(_file(source, "model_index.json") or "").read_text(encoding="utf-8"))
    part = next((key for key in ("unet", "transformer") if isinstance(index.get(key), list)), None)
    if part is None:
        raise SteeringError(f"{name!r} has neither a unet nor a transformer to steer.")
    denoiser_class = getattr(diffusers, index[part][1], None)
    scheduler_class = getattr(diffusers, index.get("scheduler", ["", ""])[1], None)
    if denoiser_class is None or scheduler_class is None:
        raise SteeringError(f"{index[part][1]} or its scheduler is no class of the installed diffusers.")
    config = _readable(source, lambda: denoiser_class.load_config(source, subfolder=part))
    with torch.device("meta"):
        denoiser = denoiser_class.from_config(config)
    return denoiser, scheduler_class.from_pretrained(source, subfolder="scheduler")


def placement(device: str, dtype: str) -> tuple[Any, Any]:
    """Torch's device and dtype of the options ``--device`` and ``--dtype``."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SteeringError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    if dtype == "auto":
        return place, torch.float32 if place.type == "cpu" else torch.bfloat16
    return place, getattr(torch, dtype)


class RunError(Exception):
    """A library could not do what it was asked for."""


@contextmanager
def running(target: Any) -> Iterator[None]:
    """Around a call of a pipeline or model: whatever a library raises becomes one sentence that says where.

    Raises:
        RunError: instead of what the library raised.
    """
    try:
        yield
    except (SteeringError, OSError, MemoryError):
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}"
        raise RunError(f"{type(target).__name__} failed: {what} ({place.filename}, line {place.lineno})") from error


def _file(source: str, name: str) -> str | None:
    """A file of a folder or hub repository; None where the repository has none of that name."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder / name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(source, name)
    except LocalEntryNotFoundError as error:
        raise SteeringError(f"There is no folder {source!r}, and the hub cannot be reached to look for it.") from error
    except EntryNotFoundError:
        return None
    except (OSError, HFValidationError) as error:
        raise SteeringError(f"There is no folder {source!r}, and from the hub: {_first_line(error)}") from error


def _readable(source: str, read: Any) -> Any:
    """The result of ``read``; what the libraries raise about files becomes one sentence."""
    from safetensors import SafetensorError

    try:
        return read()
    except SteeringError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise OSError(f"{source!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

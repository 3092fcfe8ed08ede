"""The methods: one file per published paper. ``available()`` lists them together with those of installed plug-ins.

A package adds a processor by an entry point of the group ``attnsteer.processors``; from then on it is importable from
here, known to the command line, and loadable from a configuration.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnsteer.processor import Processor

    from .a_star import AStar
    from .attend_and_excite import AttendAndExcite
    from .carve import CARVE
    from .conform import Conform
    from .consistent_self_attention import ConsistentSelfAttention
    from .divide_and_bind import DivideAndBind
    from .focus import Focus
    from .gaze_shift import GazeShift
    from .gift import GIFT
    from .icd import ICD
    from .image_contrast import ImageContrast
    from .ir_diffusion import IRDiffusion
    from .m3id import M3ID
    from .pag import PAG
    from .pai import PAI
    from .paint import PAINT
    from .seg import SEG
    from .shared_self_attention import SharedSelfAttention
    from .softpag import SoftPAG
    from .syngen import SynGen
    from .vaf import VAF
    from .var import VAR
    from .vcd import VCD
    from .vhd import VHD
    from .vhr import VHR
    from .vicrop import ViCrop

GROUP = "attnsteer.processors"
_SHIPPED = {
    "AStar": "a_star",
    "AttendAndExcite": "attend_and_excite",
    "CARVE": "carve",
    "Conform": "conform",
    "ConsistentSelfAttention": "consistent_self_attention",
    "DivideAndBind": "divide_and_bind",
    "Focus": "focus",
    "GIFT": "gift",
    "GazeShift": "gaze_shift",
    "ICD": "icd",
    "IRDiffusion": "ir_diffusion",
    "ImageContrast": "image_contrast",
    "M3ID": "m3id",
    "PAG": "pag",
    "PAI": "pai",
    "PAINT": "paint",
    "SEG": "seg",
    "SharedSelfAttention": "shared_self_attention",
    "SoftPAG": "softpag",
    "SynGen": "syngen",
    "VCD": "vcd",
    "VAF": "vaf",
    "VAR": "var",
    "VHD": "vhd",
    "VHR": "vhr",
    "ViCrop": "vicrop",
}

__all__ = [
    "CARVE",
    "GIFT",
    "ICD",
    "M3ID",
    "PAG",
    "PAI",
    "PAINT",
    "SEG",
    "VAF",
    "VAR",
    "VCD",
    "VHD",
    "VHR",
    "AStar",
    "AttendAndExcite",
    "Conform",
    "ConsistentSelfAttention",
    "DivideAndBind",
    "Focus",
    "GazeShift",
    "IRDiffusion",
    "ImageContrast",
    "SharedSelfAttention",
    "SoftPAG",
    "SynGen",
    "ViCrop",
    "available",
    "get",
]


def _plugins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in _SHIPPED}


def available() -> tuple[str, ...]:
    """Names of all processors: the shipped ones, then those of installed packages. Imports none of them."""
    return (*sorted(_SHIPPED), *sorted(_plugins()))


def get(name: str) -> type[Processor]:
    """The processor class of that name.

    Raises:
        SteeringError: no such processor, or the entry point of that name is no ``Processor``; says what exists.
    """
    from attnsteer.errors import SteeringError
    from attnsteer.processor import Processor

    if name in _SHIPPED:
        return getattr(import_module(f"{__name__}.{_SHIPPED[name]}"), name)
    plugins = _plugins()
    if name not in plugins:
        raise SteeringError(f"There is no processor {name!r}; there are: {', '.join(available())}.")
    found = plugins[name].load()
    if not (isinstance(found, type) and issubclass(found, Processor)):
        where = f"{name} = {plugins[name].value}"
        raise SteeringError(f"The entry point {where!r} is no subclass of attnsteer.Processor.")
    return found


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in available():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; processors: {', '.join(available())}")
    return get(name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(available()))

"""attnsteer steers what a pretrained model looks at, without training it.

Importing this package costs nothing: every public name is loaded when it is first used, and neither torch nor diffusers
nor transformers is imported before that.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .pipelines import install as _install

if TYPE_CHECKING:
    from .attach import Steering, attach, detach, sites, steer
    from .attend import attend
    from .capture import Capture
    from .edits import (
        ClassMask,
        Edit,
        KeyBias,
        LogitEdit,
        Mix,
        Redistribute,
        Replace,
        RowKeys,
        Scale,
        Segments,
    )
    from .errors import NotReachedError, SteeringError, WhereError
    from .explain import Explanation, explain
    from .heat import AnswerMaps, HeatMaps, answer_maps, heat_maps
    from .hosts.replay import Prefill, prefill
    from .inversion import invert
    from .lanes import Lane
    from .processor import Processor
    from .references import noised_references
    from .rehearsal import rehearse
    from .site import AttentionCall, Site, Spans
    from .variants import Variant, run_variants
    from .where import Where

__all__ = [
    "AnswerMaps",
    "AttentionCall",
    "Capture",
    "ClassMask",
    "Edit",
    "Explanation",
    "HeatMaps",
    "KeyBias",
    "Lane",
    "LogitEdit",
    "Mix",
    "NotReachedError",
    "Prefill",
    "Processor",
    "Redistribute",
    "Replace",
    "RowKeys",
    "Scale",
    "Segments",
    "Site",
    "Spans",
    "Steering",
    "SteeringError",
    "Variant",
    "Where",
    "WhereError",
    "__version__",
    "answer_maps",
    "attach",
    "attend",
    "detach",
    "explain",
    "heat_maps",
    "invert",
    "noised_references",
    "prefill",
    "rehearse",
    "run_variants",
    "sites",
    "steer",
]

_MODULE_OF = {
    "AnswerMaps": "heat",
    "AttentionCall": "site",
    "Capture": "capture",
    "ClassMask": "edits",
    "Edit": "edits",
    "Explanation": "explain",
    "HeatMaps": "heat",
    "KeyBias": "edits",
    "LogitEdit": "edits",
    "Lane": "lanes",
    "Mix": "edits",
    "NotReachedError": "errors",
    "Prefill": "hosts.replay",
    "Processor": "processor",
    "Redistribute": "edits",
    "Replace": "edits",
    "RowKeys": "edits",
    "Scale": "edits",
    "Segments": "edits",
    "Site": "site",
    "Spans": "site",
    "Steering": "attach",
    "SteeringError": "errors",
    "Variant": "variants",
    "Where": "where",
    "WhereError": "errors",
    "answer_maps": "heat",
    "attach": "attach",
    "attend": "attend",
    "detach": "attach",
    "explain": "explain",
    "heat_maps": "heat",
    "prefill": "hosts.replay",
    "invert": "inversion",
    "noised_references": "references",
    "rehearse": "rehearsal",
    "run_variants": "variants",
    "sites": "attach",
    "steer": "attach",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


class _Package(ModuleType):
    """Keeps ``attnsteer.attach`` the function: importing the submodule of the same name would overwrite it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_install()

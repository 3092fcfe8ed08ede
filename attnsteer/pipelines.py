"""``pipe.set_attn_processor``: the method that every ``DiffusionPipeline`` has once attnsteer is imported.

Whoever imports diffusers first or attnsteer first gets the method; whoever never imports diffusers does not pay for it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from .attach import Steering

_BASE = "diffusers.pipelines.pipeline_utils"
_stock: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""The processors of every denoiser before stock ones were handed to it through a pipeline."""


def set_attn_processor(self: Any, *processors: Any, **options: Any) -> Steering | None:
    """Steer this pipeline with processors, in place of whatever was set before.

    Args:
        processors: attnsteer processors, one by one or in a list; or a stock Diffusers processor or a dict of them,
            which go to the denoiser's own method; or ``None``, which makes the pipeline as it was.
        options: arguments of ``attnsteer.attach``.

    Returns:
        The handle of ``attnsteer.attach``; None where nothing of attnsteer is attached.

    Raises:
        SteeringError: every reason why this cannot be done. Then, and whatever else is raised, what was set before
            stays.
    """
    from .attach import attach, attached_to
    from .errors import SteeringError
    from .hosts.worlds import models_of
    from .processor import Processor

    given = _flat(processors)
    own = [p for p in given if isinstance(p, Processor)]
    if own and len(own) < len(given):
        raise SteeringError("attnsteer processors and stock processors cannot be set at once: attach ours second.")
    if given and not own and options:
        raise SteeringError(f"{', '.join(options)} means nothing to stock processors: leave it out.")
    before = attached_to(self)
    if before is not None:
        before.detach()
    try:
        if own:
            return attach(self, *own, **options)
        for denoiser in models_of(self):
            _set_stock(denoiser, given[0] if given else None)
    except BaseException:
        if before is not None:
            before._start()
        raise
    return None


def _flat(processors: Sequence[Any]) -> list[Any]:
    """The processors of a call: none for ``None``, else one by one."""
    from .errors import SteeringError

    if not processors:
        raise SteeringError("Give at least one processor, or None to make the pipeline as it was.")
    if len(processors) == 1 and isinstance(processors[0], (list, tuple)):
        processors = processors[0]
        if not processors:
            raise SteeringError("The list of processors is empty: give at least one, or None to detach.")
    given = [p for p in processors if p is not None]
    if len(given) < len(processors) and len(processors) > 1:
        raise SteeringError("None makes the pipeline as it was, so it stands alone.")
    return given


def _set_stock(denoiser: Any, processor: Any) -> None:
    """Hand a stock processor (or a dict of them) to the denoiser; None gives back what it had at first."""
    if processor is None:
        had = _stock.pop(denoiser, None)
        if had is not None:
            denoiser.set_attn_processor(dict(had))
        return
    if not hasattr(denoiser, "set_attn_processor"):
        from .errors import SteeringError

        raise SteeringError(f"{type(denoiser).__name__} takes no stock processors; attnsteer processors attach to it.")
    had = dict(denoiser.attn_processors)
    try:  # the library's method empties the dict that it is given
        denoiser.set_attn_processor(dict(processor) if isinstance(processor, Mapping) else processor)
    except BaseException:  # it may have set some of them
        denoiser.set_attn_processor(had)
        raise
    _stock.setdefault(denoiser, had)


# ---- giving the method to DiffusionPipeline, now or when it is imported ----------------------------------------------
def install() -> None:
    """Add the method now if diffusers' pipelines are loaded, else as soon as they are."""
    module = sys.modules.get(_BASE)
    if module is not None and hasattr(module, "DiffusionPipeline"):
        _extend(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _extend(module: ModuleType) -> None:
    module.DiffusionPipeline.set_attn_processor = set_attn_processor


class _Finder:
    """Leaves finding to the other finders, and adds the method after the module of the base class has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _BASE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            del loader.exec_module
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _extend(module)

        loader.exec_module = exec_module
        return spec

"""``Clock``: where in the schedule the sampler is, for any scheduler of diffusers.

Schedulers disagree about what they tell (``step_index`` is None, late or absent), and a step may take several model
calls. What all pipelines share is that they call ``scheduler.set_timesteps`` once and ``scheduler.step`` once per entry
of ``scheduler.timesteps``. The clock wraps these two on the instance and counts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

StepHook = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Gets the model output and the sample that arrive at ``scheduler.step`` and returns those that the scheduler shall
see. The sample is None where the scheduler takes it in another way."""


class Method:
    """A wrapped method of a scheduler or pipeline. Pipelines read its signature; a copied or pickled owner gets a plain
    one."""

    __name__: str

    def __init__(self, scheduler: Any, method: Callable[..., Any], around: Callable[..., Any]):
        functools.update_wrapper(self, method)
        self._scheduler = scheduler
        self._around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _plain_method, (self._scheduler, self.__name__)


def _plain_method(scheduler: Any, name: str) -> Any:
    return getattr(type(scheduler), name).__get__(scheduler)


class Clock:
    """Position in the schedule of one scheduler.

    Attributes:
        index: position in ``scheduler.timesteps`` of the step in progress.
        timesteps: the schedule as floats; empty before the first run.
        running: True from the first known schedule on.
    """

    def __init__(self, scheduler: Any, on_start: Callable[[], None], on_step: StepHook):
        self.scheduler = scheduler
        self.index = 0
        self.timesteps: list[float] = []
        self._started = False
        self._attached = True
        self._on_start = on_start
        self._on_step = on_step
        self._saved: dict[str, Any] = {name: vars(scheduler).get(name) for name in ("set_timesteps", "step")}
        self._ours = self._wrap()

    @property
    def total(self) -> int:
        return len(self.timesteps)

    @property
    def running(self) -> bool:
        return bool(self.timesteps)

    @property
    def timestep(self) -> float:
        """The scheduler's timestep of the step in progress."""
        return self.timesteps[min(self.index, self.total - 1)]

    @property
    def sigma(self) -> float | None:
        """The noise level of the step in progress, where the scheduler has one; infinite where nothing but noise is."""
        sigmas = getattr(self.scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) > self.index:
            return float(sigmas[self.index])
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        if alphas is None:
            return None
        alpha = float(alphas[min(int(self.timestep), len(alphas) - 1)])
        return ((1 - alpha) / alpha) ** 0.5 if alpha > 0 else math.inf

    def enter(self, timestep: Any) -> None:
        """Called before a model call. The first of a run may start inside the schedule (image-to-image).

        A loop may have set its timesteps before we came, and may go through them again without setting them anew.
        """
        if not self.running or self.index >= self.total:
            self.sync()
        if self._started:
            return
        self._started = True
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is None and isinstance(timestep, Tensor):
            given = float(timestep.flatten()[0])
            begin = next((i for i, t in enumerate(self.timesteps) if abs(t - given) < 1e-4), 0)
        self.index = int(begin or 0)

    def sync(self) -> None:
        """Read the schedule from the scheduler: a run begins."""
        self.timesteps = [float(t) for t in self.scheduler.timesteps.tolist()]
        self.index = 0
        self._started = False

    def _wrap(self) -> dict[str, Any]:
        scheduler = self.scheduler
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        def start(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            if self._attached:
                self.sync()
                self._on_start()
            return result

        def advance(*args: Any, **kwargs: Any) -> Any:
            if not self._attached:  # somebody else's wrapper still calls us
                return step(*args, **kwargs)
            given = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
            output, sample = self._on_step(given["model_output"], given.get("sample"))
            if "model_output" in kwargs:
                kwargs["model_output"] = output
            else:
                args = (output, *args[1:])
            if "sample" in kwargs:
                kwargs["sample"] = sample
            elif len(args) > 2:
                args = (*args[:2], sample, *args[3:])
            try:
                return step(*args, **kwargs)
            finally:
                self.index += 1

        ours = {
            "set_timesteps": Method(scheduler, set_timesteps, start),
            "step": Method(scheduler, step, advance),
        }
        vars(scheduler).update(ours)
        return ours

    def detach(self) -> None:
        """Give the scheduler its own methods back; what somebody else wrapped around ours stays and passes through."""
        self._attached = False
        for name, saved in self._saved.items():
            if vars(self.scheduler).get(name) is not self._ours[name]:
                continue
            if saved is None:
                vars(self.scheduler).pop(name)
            else:
                setattr(self.scheduler, name, saved)

"""What somebody's objective depends on: its code and all that is bound to it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnsteer.search import Harmonic
from attnsteer.search.objectives import objective_of
from tests.tiny import encoders


def test_settings_of_functions_tell_their_code_apart() -> None:
    first: Any = lambda images, prompts: [1.0 for _ in images]  # noqa: E731
    same: Any = lambda images, prompts: [1.0 for _ in images]  # noqa: E731
    changed: Any = lambda images, prompts: [2.0 for _ in images]  # noqa: E731
    codes = [objective_of(function).settings["code"] for function in (first, same, changed)]
    assert codes[0] == codes[1] != codes[2]

    class Mine:
        settings = {"version": 2}  # noqa: RUF012

        def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
            return [0.0] * len(images)

    assert objective_of(Mine()).settings["settings"] == {"version": 2}


def with_default(target: float) -> Any:
    def score(images: Sequence[Any], prompts: Sequence[str], aim: float = target, *, sign: float = target) -> Any:
        return [aim * sign for _ in images]

    return score


def with_closure(target: Any) -> Any:
    def score(images: Sequence[Any], prompts: Sequence[str]) -> Any:
        return [target for _ in images]

    return score


def with_inner_function(target: float) -> Any:
    return with_closure(with_default(target))


def with_argument(target: float) -> Any:
    return functools.partial(with_default(0.0), aim=target)


class WithAttribute:
    def __init__(self, target: Any):
        self.target = target

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        return [self.target for _ in images]


def with_object(target: float) -> Any:
    return WithAttribute(target).__call__


def with_tensor(target: float) -> Any:
    return with_closure([torch.full((2,), target), np.full(3, target)])


def with_module(target: float) -> Any:
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, target)
    torch.nn.init.zeros_(module.bias)
    return WithAttribute({"model": module})


class Judging(torch.nn.Module):
    def __init__(self, target: float):
        super().__init__()
        self.target, self.inner = target, torch.nn.Linear(2, 2)
        torch.nn.init.zeros_(self.inner.weight)
        torch.nn.init.zeros_(self.inner.bias)

    def forward(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        return [self.target for _ in images]


def with_module_in_closure(target: float) -> Any:
    return with_closure(torch.nn.Sequential(Judging(target)))


def with_unsaved_buffer(target: float) -> Any:
    module = Judging(0.0)
    module.register_buffer("aim", torch.tensor(target), persistent=False)
    return module


def with_hook(target: float) -> Any:
    module = Judging(0.0)
    module.inner.register_forward_hook(lambda module, args, output: output + target)
    return module


def with_one_weight(target: float) -> Any:
    module = Judging(0.0)
    module.inner = torch.nn.Linear(50, 50)
    torch.nn.init.zeros_(module.inner.weight)[7, 3] = target
    torch.nn.init.zeros_(module.inner.bias)
    return module


def with_forward(target: float) -> Any:
    """Modules of one name whose forward differs."""

    class Scoring(Judging):
        if target > 0.5:

            def forward(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
                return [self.target + 1 for _ in images]

    return torch.nn.Sequential(Scoring(0.0))


def with_helper(target: float) -> Any:
    """Objects of one name with the same ``__call__``, whose helper method differs."""

    class Scoring:
        def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
            return [self.one(image) for image in images]

        if target > 0.5:

            def one(self, image: Any) -> float:
                return 1.0
        else:

            def one(self, image: Any) -> float:
                return 0.0

    class Below(Scoring):
        pass

    return Below()


def with_told_helper(target: float) -> Any:
    scoring = with_helper(target)
    scoring.settings = {"version": 1}
    return scoring


def with_property(target: float) -> Any:
    class Scoring(WithAttribute):
        aim = property((lambda self: 1.0) if target > 0.5 else (lambda self: 0.0))

    return Scoring(0.0)


def with_class_attribute(target: float) -> Any:
    class Scoring(WithAttribute):
        aim = target

    return Scoring(0.0)


MAKERS = [
    with_default,
    with_closure,
    with_inner_function,
    with_argument,
    WithAttribute,
    with_object,
    with_tensor,
    with_module,
    Judging,
    with_module_in_closure,
    with_unsaved_buffer,
    with_hook,
    with_one_weight,
    with_forward,
    with_helper,
    with_told_helper,
    with_property,
    with_class_attribute,
]


@pytest.mark.parametrize("make", MAKERS)
def test_settings_of_functions_tell_what_is_bound_to_them(make: Any) -> None:
    with torch.no_grad():
        found = [objective_of(make(target)) for target in (0.1, 0.1, 0.9)]
    assert all(objective.reusable for objective in found)
    assert found[0].settings == found[1].settings != found[2].settings


def test_a_checkpoint_inside_a_function_has_settings(tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder = encoders.clip(tmp_path)
    found = [objective_of(with_closure(CLIPModel.from_pretrained(folder))) for _ in range(2)]
    assert found[0].reusable and found[0].settings == found[1].settings


def test_a_function_that_holds_itself_has_settings() -> None:
    def make(target: float) -> Any:
        def score(images: Sequence[Any], prompts: Sequence[str]) -> Any:
            return score(images[1:], prompts) if len(images) > 1 else [target]

        return score

    codes = [objective_of(make(target)).settings["code"] for target in (0.1, 0.1, 0.9)]
    assert codes[0] == codes[1] != codes[2]


def test_scores_are_not_reusable_where_something_cannot_be_hashed() -> None:
    module = Judging(0.0)
    module.source = iter([1])
    unknown = [with_closure(object()), WithAttribute(iter([1])), functools.partial(with_default(0.0), aim=object())]
    unknown += [module, with_closure(torch.nn.Linear(2, 2, device="meta"))]
    for function in unknown:
        assert not objective_of(function).reusable
        assert not Harmonic([with_default(1.0), function]).reusable
    told = with_closure(object())
    told.settings = {"target": 3}
    assert objective_of(told).reusable
    assert objective_of(told).settings["settings"] == {"target": 3}
    assert Harmonic([with_default(1.0), with_closure(1.0)]).reusable


@pytest.mark.slow
def test_settings_of_functions_do_not_depend_on_the_process() -> None:
    """Sets have another order in each process, unless they are told their seed."""
    script = """
from attnsteer.search.objectives import objective_of
known = {"a dog", "a cat", "a red car", "a bus"}
def make(more):
    return lambda images, prompts: [1.0 if p in more or p in {"a", "b", "c", "dog"} else 0.0 for p in prompts]
print(objective_of(make(known)).settings["code"])
"""
    found = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert len(found) == 1

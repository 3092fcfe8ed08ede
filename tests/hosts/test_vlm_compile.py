"""Compiled language models: the same results, and a number of graphs that does not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, KeyBias, Processor, Where
from attnsteer.processors import VCD, ImageContrast
from attnsteer.processors.vhr import VHR
from tests.tiny import vlms

pytestmark = pytest.mark.slow


@pytest.fixture
def counted() -> Iterator[tuple[Callable[..., Any], list[int]]]:
    """A backend that runs graphs as they are, and the number of graphs it was given."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(1)
        return graph.forward

    yield backend, graphs
    torch._dynamo.reset()


def _toggle(target: Any, run: Callable[[], Tensor], expected: Tensor, graphs: list[int]) -> list[int]:
    """Attach and detach three times; gives the number of graphs after the first and after the last time."""
    plain, counts = run(), []
    for alpha in (2.0, 2.0, 2.0):
        with attnsteer.steer(target, VHR(Where(layers="all"), alpha=alpha)):
            steered = run()
        torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(run(), plain)
        counts.append(len(graphs))
    assert not torch.allclose(plain, expected, atol=1e-2)
    return counts


def _eager(name: str, inputs: dict[str, Any], run: Callable[[Any], Tensor]) -> Tensor:
    model, _ = vlms.build(name)
    with attnsteer.steer(model, VHR(Where(layers="all"))):
        return run(model)


def _static(model: Any, inputs: dict[str, Any]) -> Tensor:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits)


def _compile_decoding(model: Any, backend: Callable[..., Any]) -> None:
    """Make generate() do on a CPU what it does on a GPU."""
    compiled: list[Any] = []

    def get_compiled_call(config: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(model.__call__, backend=backend, fullgraph=True))
        return compiled[0]

    model._valid_auto_compile_criteria = lambda *_: True
    model.get_compiled_call = get_compiled_call


@dataclass(frozen=True)
class BoostLatest(Processor):
    """Needs up-to-date spans in every step: the text keys get a bias that differs from that of the image keys."""

    kinds = ("causal",)

    def react(self, call: AttentionCall) -> KeyBias:
        return KeyBias((call.spans.text.float() - 2 * call.spans.image.float())[:, None])


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_spans_follow_compiled_decoding(name: str, counted: Any) -> None:
    backend, graphs = counted
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    with attnsteer.steer(model, BoostLatest()):
        expected = _static(model, inputs)
    _compile_decoding(model, backend)
    with attnsteer.steer(model, BoostLatest()):
        torch.testing.assert_close(_static(model, inputs), expected, rtol=1e-4, atol=1e-4)
        before = len(graphs)
        _static(model, inputs)
    assert len(graphs) == before > 0


@pytest.mark.parametrize("name", ["llava", "qwen25", "gemma3"])
def test_compiled_decoding_with_a_static_cache_takes_one_more_graph_in_all(name: str, counted: Any) -> None:
    """What generate() does by itself on a GPU: prefill as it is, decode as one full graph."""
    backend, graphs = counted
    model, make = vlms.build(name)
    inputs = make(2, left_padding=True)
    expected = _eager(name, inputs, lambda m: _static(m, inputs))
    _compile_decoding(model, backend)
    _static(model, inputs)
    before = len(graphs)
    counts = _toggle(model, lambda: _static(model, inputs), expected, graphs)
    assert before > 0
    assert counts[-1] == counts[0] <= 2 * before


def test_layers_compiled_one_by_one_take_a_fixed_number_of_graphs(counted: Any) -> None:
    backend, graphs = counted
    model, make = vlms.build("llava")
    inputs = {**make(2), "use_cache": False}  # with a cache every layer is a graph of its own, also without us
    expected = _eager("llava", inputs, lambda m: m(**inputs).logits)
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend, fullgraph=True)
    model(**inputs)
    before = len(graphs)
    counts = _toggle(model, lambda: model(**inputs).logits, expected, graphs)
    assert before > 0
    assert counts[-1] == counts[0] <= before + 3


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_whole_compiled_model_is_steered_from_outside(how: str, counted: Any) -> None:
    backend, graphs = counted
    model, make = vlms.build("llava")
    inputs = make(2)
    expected = _eager("llava", inputs, lambda m: m(**inputs).logits)
    target = torch.compile(model, backend=backend) if how == "wrapped" else model
    if how == "in place":
        model.compile(backend=backend)
    target(**inputs)
    counts = _toggle(target, lambda: target(**inputs).logits, expected, graphs)
    assert counts[-1] == counts[0]
    assert ("_compiled_call_impl" in model.__dict__) == (how == "in place")


def test_a_contrast_beside_compiled_decoding_takes_no_graph_of_its_own(counted: Any) -> None:
    """The user's rows run compiled, their counterparts do not."""
    backend, graphs = counted
    inputs = vlms.build("llava")[1](2, left_padding=True)
    for processor in (ImageContrast(gamma=2.5), VCD(alpha=2.0)):
        model, _ = vlms.build("llava")
        with attnsteer.steer(model, processor):
            expected = _static(model, inputs)
        _compile_decoding(model, backend)
        plain, before = _static(model, inputs), len(graphs)
        for _ in range(2):
            with attnsteer.steer(model, processor):
                torch.testing.assert_close(_static(model, inputs), expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(_static(model, inputs), plain)
        assert len(graphs) - before <= 1


@pytest.mark.parametrize("how", ["compiled in place", "torch.compile"])
def test_a_whole_compiled_model_is_contrasted_from_outside(how: str, counted: Any) -> None:
    backend, _ = counted
    model, make = vlms.build("llava")
    inputs = make(2, left_padding=True)
    with attnsteer.steer(model, ImageContrast(gamma=2.5)):
        expected = model(**inputs).logits
    if how == "compiled in place":
        model.compile(backend=backend)
    target = torch.compile(model, backend=backend) if how == "torch.compile" else model
    plain = target(**inputs).logits
    with attnsteer.steer(target, ImageContrast(gamma=2.5)):
        torch.testing.assert_close(target(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(target(**inputs).logits, plain)

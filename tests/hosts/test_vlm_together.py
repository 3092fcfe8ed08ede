"""Variants that differ in numbers are asked together: once a site and step, and each row is what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, Processor, Where
from attnsteer.processors.gift import GIFT
from attnsteer.processors.pai import PAI
from attnsteer.processors.paint import PAINT
from attnsteer.processors.vaf import VAF
from attnsteer.processors.vhr import VHR
from attnsteer.scheduler import make_plan, together
from tests.engine.common import double
from tests.hosts.common import GREEDY
from tests.tiny import vlms

SOME = Where(layers=[1, 2], heads={1: [0, 3], 2: "all"})
STRENGTHS: dict[str, list[Processor]] = {
    "PAI": [PAI(alpha=0.3), PAI(SOME, alpha=0.7), PAI(Where(layers="all"), alpha=0.1)],
    "GIFT": [
        GIFT(alpha=0.3, saliency=1, token_selector="all"),
        GIFT(SOME, alpha=4.7, beta=2.0, saliency=1, token_selector="all"),
        GIFT(alpha=2.0, saliency=1, token_selector="all"),
    ],
    "PAINT": [PAINT(alpha=0.3), PAINT(SOME, alpha=0.5, beta=0.1), PAINT(Where(layers="all"), alpha=0.1)],
    "VAF": [VAF(alpha=0.3), VAF(SOME, alpha=0.7), VAF(Where(layers="all"), beta=0.3)],
    "VAF of some heads": [VAF(SOME, alpha=x, head_fraction=0.4) for x in (0.3, 0.6, 0.9)],
    "VHR": [VHR(alpha=3.0), VHR(SOME, alpha=0.3), VHR(Where(layers="all"))],
    "VHR in decode": [VHR(Where(layers="all", steps="decode"), alpha=a) for a in (3.0, 0.3, 1.7)],
}
FEW = {"PAINT", "VAF of some heads", "VHR in decode"}
PAIRS = [(n, m) for n in ("llava", "qwen25", "gemma3") for m in STRENGTHS if n == "llava" or m not in FEW]


def scores(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    out = model.generate(**inputs, **GREEDY, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_rows_of_many_strengths_are_what_they_are_alone(name: str, method: str) -> None:
    """Left padding, rows between that are plain, beams, and layers and heads that differ."""
    model, make = vlms.build(name)
    model, inputs = model.double(), double(make(4, left_padding=True))
    first, *others = STRENGTHS[method]
    variants = [[first], [], *([other] for other in others)]
    plain = scores(model, inputs)
    with attnsteer.attach(model, variants=variants):
        found = scores(model, inputs)
        beams = model.generate(**inputs, **GREEDY, num_beams=2)[:, -5:]
    assert torch.equal(found[1], plain[1])
    for row, processors in enumerate(variants):
        alone = vlms.row(inputs, row)
        with attnsteer.attach(model, variants=[processors]):
            torch.testing.assert_close(
                found[row], scores(model, alone)[0], rtol=0, atol=2e-6
            )  # generate rounds to float32
            assert torch.equal(beams[row], model.generate(**alone, **GREEDY, num_beams=2)[0, -5:])
        assert torch.equal(found[row], plain[row]) == (row == 1)


@pytest.mark.parametrize("method", ["PAI", "VHR"])
def test_one_is_asked_for_all(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, make = vlms.build("llava")
    kind: Any = type(STRENGTHS[method][0])
    plain, asked = kind.react, []

    def react(self: Any, call: AttentionCall) -> Any:
        asked.append(call.site.layer)
        return plain(self, call)

    monkeypatch.setattr(kind, "react", react)
    counts = []
    for rows in (1, 3):
        variants = [[kind(Where(layers="all"), alpha=0.2 + 0.1 * row)] for row in range(rows)]
        with attnsteer.attach(model, variants=variants) as steering:
            model(**make(3))
            states = [steering.states(processor) for processor in steering.processors]
        counts.append(sorted(asked))
        asked.clear()
        assert all(one.keys() == states[0].keys() for one in states)
        assert all(one[site] is states[0][site] for one in states for site in one)  # what it leaves is theirs
    assert counts[0] == counts[1]


def test_who_is_asked_together() -> None:
    model, _ = vlms.build("llava")
    sites = attnsteer.sites(model)

    def groups(*rows: list[Processor]) -> list[list[Processor]]:
        made = [[make_plan(processor, sites) for processor in row] for row in rows]
        return [[plan.processor for plan in group] for group in together(made)]

    weak, strong, late = PAI(alpha=0.1), PAI(SOME, alpha=0.9), PAI(Where(steps="decode"), alpha=0.5)
    assert groups([weak], [], [strong]) == [[weak, strong]]
    assert groups([weak], [late]) == [[weak], [late]]  # not at the same time
    assert groups([weak, strong]) == [[weak], [strong]]  # one after the other in one row
    assert groups([weak, strong], [late], [PAI()]) == [[weak, PAI()], [strong], [late]]
    assert groups([GIFT(alpha=1)], [GIFT()]) == [[GIFT(alpha=1)], [GIFT()]]  # the paper's alpha depends on the layer
    assert groups([GIFT(alpha=1)], [GIFT(alpha=1, enhanced_heads=1)]) == [
        [GIFT(alpha=1)],
        [GIFT(alpha=1, enhanced_heads=1)],
    ]
    assert groups([weak], [PAINT()]) == [[weak], [PAINT()]]


def test_two_methods_of_a_row_share_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnsteer import logits

    model, make = vlms.build("llava")
    inputs, plain = make(2, left_padding=True), logits.plain_logits
    made: list[int] = []

    def counted(*given: Any) -> Tensor:
        made.append(1)
        return plain(*given)

    gift = GIFT(Where(layers=[2]), alpha=2.0, saliency=0, token_selector="all")
    with attnsteer.steer(model, gift, PAI(Where(layers=[2]))):
        model.generate(**inputs, **GREEDY)
        monkeypatch.setattr(logits, "plain_logits", counted)
        model.generate(**inputs, **GREEDY)
    assert len(made) == GREEDY["max_new_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["PAI", "VAF", "GIFT", "VHR"])
def test_many_strengths_compile_to_the_graphs_of_one(method: str) -> None:
    """Decode steps with a static cache, as generate() makes them on a GPU; toggling adds no graph."""
    options = {"cache_implementation": "static"}
    graphs: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(1)
        return graph.forward

    counts = []
    for count in (1, 3):
        torch._dynamo.reset()
        model, make = vlms.build("llava")
        inputs = make(3, left_padding=True)
        graphs.clear()
        variants = [[processor] for processor in STRENGTHS[method][:count]]
        with attnsteer.attach(model, variants=variants):
            expected = scores(model, inputs, **options)
        compiled = torch.compile(model.__call__, backend=backend, fullgraph=True)
        model._valid_auto_compile_criteria = lambda *_: True
        model.get_compiled_call = lambda _, compiled=compiled: compiled
        for _ in range(2):
            with attnsteer.attach(model, variants=variants):
                torch.testing.assert_close(scores(model, inputs, **options), expected, rtol=1e-4, atol=1e-4)
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert counts[0] == counts[1] > 0

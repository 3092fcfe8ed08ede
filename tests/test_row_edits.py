"""``LogitEdit``, ``Redistribute`` and the rows that predict, against loops over the explicit map."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnsteer.attend import attend, conflicts, refusals
from attnsteer.edits import (
    Edit,
    KeyBias,
    LogitEdit,
    MeanValue,
    Mix,
    OwnValue,
    Redistribute,
    Scale,
    Segments,
    map_tensors,
    restrict,
    stack_rows,
    tile_rows,
)
from attnsteer.errors import SteeringError
from attnsteer.kernels import reference
from attnsteer.redistribute import FEW_ROWS, key_mass
from attnsteer.site import AttentionCall

from .calls import LargestTensor, call_of, explicit_map, make_call, repeated, rows_of, untouched

N = 13
HEADS = torch.tensor([[True, False, True, True, False, True], [True] * 6, [False] * 6])
QUERIES = torch.arange(N)[None] >= torch.tensor([[5], [9], [0]])  # starts differ per row, as with left padding
WEIGHT = torch.linspace(-0.5, 1.5, 3 * N).reshape(3, 1, N).masked_fill(torch.arange(N) % 3 == 1, 0.0)
PER_HEAD = WEIGHT * torch.linspace(0.2, 1.0, 6)[:, None]
KINDS = ("none", "keys_bool", "keys_float", "full_bool", "full_float", "causal")


def causal_logits(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The logits before and behind the mask, float64."""
    plain = reference.logits(call.q, call.k, scale=call.scale)
    return plain, reference.logits(call.q, call.k, mask=call.mask, scale=call.scale, is_causal=call.is_causal)


def edited(call: AttentionCall, edit: LogitEdit) -> Tensor:
    """The output of a logit edit, one key at a time."""
    before, logits = causal_logits(call)
    out, (batch, heads, n_q, n_k) = logits.clone(), logits.shape
    weight = edit.weight.double().expand(batch, heads, n_k)
    for b in range(batch):
        for h in range(heads):
            for i in range(n_q):
                row = i >= n_q - call.predicts if edit.queries is None else bool(edit.queries[b, i])
                if row and (edit.heads is None or bool(edit.heads[b, h])):
                    for j in range(n_k):
                        z = before[b, h, i, j] if edit.form == "signed" else logits[b, h, i, j].abs()
                        if logits[b, h, i, j] > -math.inf:
                            out[b, h, i, j] += weight[b, h, j] * z
    return torch.softmax(out, -1) @ repeated(call.v, call)


# ---- LogitEdit -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("weight", [WEIGHT, PER_HEAD])
@pytest.mark.parametrize("heads", [None, HEADS])
def test_scaled_keys_equal_the_explicit_logits(mask: str, weight: Tensor, heads: Tensor | None) -> None:
    torch.manual_seed(0)
    call = make_call(mask=mask, kind="causal")
    edit = LogitEdit(weight, "signed", QUERIES, heads)
    with untouched([call.q, call.k, call.v]):
        out = attend(call, [edit])
    torch.testing.assert_close(out, edited(call, edit), atol=1e-12, rtol=0)
    plain = call.output
    rows = QUERIES[:, None].expand(3, 6, N) if heads is None else QUERIES[:, None] & heads[..., None]
    assert torch.equal(out[~rows], plain[~rows])
    assert not torch.equal(out, plain)


@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("form", ["signed", "absolute"])
@pytest.mark.parametrize("predicts", [0, 1, 4])
def test_rows_that_predict_equal_the_explicit_logits(mask: str, form: str, predicts: int) -> None:
    torch.manual_seed(1)
    call = make_call(mask=mask, kind="causal")
    call.predicts = predicts
    edit = LogitEdit(PER_HEAD, form, heads=HEADS)  # type: ignore[arg-type]
    out = attend(call, [edit])
    torch.testing.assert_close(out, edited(call, edit), atol=1e-12, rtol=0)
    assert torch.equal(out[:, :, : N - predicts], call.output[:, :, : N - predicts])
    assert torch.equal(out, call.output) == (predicts == 0)


def test_logits_by_hand() -> None:
    """z = [1, 2, -1] on one query and three keys."""
    q, v = torch.tensor([[[[1.0]]]]), torch.eye(3)[None, None]
    k = torch.tensor([[[[1.0], [2.0], [-1.0]]]])
    call = call_of(q, k, v, scale=1.0)

    def probabilities(form: str, weight: list[float]) -> Tensor:
        return attend(call, [LogitEdit(torch.tensor([[weight]]), form)])[0, 0, 0]  # type: ignore[arg-type]

    def check(form: str, weight: list[float], expected: list[float]) -> None:
        torch.testing.assert_close(probabilities(form, weight), torch.tensor(expected), atol=6e-5, rtol=0)

    check("absolute", [0, 0, 0], [0.2595, 0.7054, 0.0351])
    check("absolute", [0, 0.5, 0.5], [0.1161, 0.8580, 0.0259])  # [1, 3, -0.5]
    check("signed", [-0.05, 0.15, 0.15], [0.2008, 0.7746, 0.0246])  # [0.95, 2.3, -1.15]


def test_keys_that_eager_hides_by_the_lowest_number_stay_hidden() -> None:
    torch.manual_seed(2)
    hidden = torch.zeros(1, 1, 3, 5)
    hidden[..., 3:] = torch.finfo(torch.float32).min
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    edit = LogitEdit(torch.full((1, 1, 5), 0.9), "absolute")
    out = attend(call_of(q, k, v, hidden), [edit])
    short = attend(call_of(q, k[:, :, :3], v[:, :, :3]), [LogitEdit(edit.weight[..., :3], "absolute")])
    torch.testing.assert_close(out, short, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["signed", "absolute"])
def test_weight_zero_keeps_the_bits(form: str) -> None:
    torch.manual_seed(3)
    call = make_call(mask="causal", kind="causal", dtype=torch.float32)
    queries = QUERIES if form == "signed" else None
    for heads in (None, HEADS):
        edit = LogitEdit(torch.zeros(3, 1, N), form, queries, heads)  # type: ignore[arg-type]
        assert torch.equal(attend(call, [edit]), call.output)
    off = LogitEdit(WEIGHT, form, queries, torch.zeros_like(HEADS))  # type: ignore[arg-type]
    assert torch.equal(attend(call, [off]), call.output)


def test_row_edits_meet_in_one_softmax() -> None:
    """A signed change acts before the mask, then the bias, then the absolute change of what these left."""
    torch.manual_seed(4)
    call = make_call(mask="causal", kind="causal")
    call.predicts = 2
    bias = torch.randn(3, 6, 2, N)
    edits: list[Edit] = [
        LogitEdit(0.3 * WEIGHT, "absolute"),
        KeyBias(bias, "last"),
        LogitEdit(WEIGHT, "signed", QUERIES),
        Scale(torch.full((1, 6), 2.0)),
    ]
    before, logits = causal_logits(call)
    logits = logits + torch.where(QUERIES[:, None, :, None], WEIGHT[:, :, None].double(), 0.0) * before
    logits[:, :, -2:] += bias.double()
    last = logits[:, :, -2:]
    moved = last + torch.where(last > -math.inf, 0.3 * WEIGHT[:, :, None].double() * last.abs(), 0.0)
    logits = torch.cat([logits[:, :, :-2], moved], dim=2)
    expected = 2 * (torch.softmax(logits, -1) @ repeated(call.v, call))
    torch.testing.assert_close(attend(call, edits), expected, atol=1e-7, rtol=0)  # 0.3 in float32


def test_signed_on_top_of_a_bias_for_all_queries() -> None:
    torch.manual_seed(5)
    call = make_call(kind="causal")
    bias = torch.randn(3, 1, N)
    for queries in (QUERIES, None):
        out = attend(call, [LogitEdit(WEIGHT, "signed", queries), KeyBias(bias)])
        rows = QUERIES if queries is not None else (torch.arange(N) == N - 1).expand(3, N)
        logits = causal_logits(call)[1]
        gain = 1 + torch.where(rows[:, None, :, None], WEIGHT[:, :, None].double(), 0.0)
        expected = torch.softmax(gain * (logits + bias[:, :, None].double()), -1) @ repeated(call.v, call)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


# ---- the rows that predict, for biases -------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", KINDS)
def test_a_bias_on_the_last_rows_is_that_of_all_rows_there(mask: str) -> None:
    torch.manual_seed(6)
    call = make_call(mask=mask, kind="causal")
    call.predicts = 3
    bias, each = torch.randn(3, 6, N), torch.randn(3, 1, 3, N)
    whole = torch.zeros(3, 1, N, N)
    whole[:, :, -3:] = each
    for edit, full in ((KeyBias(bias, "last"), bias[:, :, None]), (KeyBias(each, "last"), whole)):
        expected = (explicit_map(call, full) @ repeated(call.v, call))[:, :, -3:]
        out = attend(call, [edit])
        torch.testing.assert_close(out[:, :, -3:], expected, atol=1e-12, rtol=0)
        assert torch.equal(out[:, :, :-3], call.output[:, :, :-3])


def test_two_biases_on_the_last_row_add_up() -> None:
    torch.manual_seed(7)
    call = make_call()
    one, two = torch.randn(3, 6, N), torch.randn(3, 1, N)
    out = attend(call, [KeyBias(one, "last"), KeyBias(two, "last")])
    torch.testing.assert_close(out, attend(call, [KeyBias(one + two, "last")]), atol=1e-6, rtol=0)


# ---- Redistribute ----------------------------------------------------------------------------------------------------
def sets(n_k: int = N) -> tuple[Tensor, Tensor]:
    """Keys that pay and keys that receive, of different size in each row; the last row has none that pay."""
    source, target = torch.zeros(3, n_k, dtype=torch.bool), torch.zeros(3, n_k, dtype=torch.bool)
    source[0, [0, 4, 11]] = source[1, [2]] = True
    target[0, 5:9] = target[1, 3:8] = target[2, 1:4] = True
    return source, target


def moved(call: AttentionCall, edit: Redistribute) -> tuple[Tensor, Tensor]:
    """The map and the output after moving mass, one key at a time."""
    plain = explicit_map(call)
    out = plain.clone()
    for b, h, i in torch.cartesian_prod(*map(torch.arange, plain.shape[:3])).tolist():
        row, t = plain[b, h, i], float(edit.weight[b, h, i])
        pay, get = row[edit.source[b]].sum(), row[edit.target[b]].sum()
        if t == 0 or pay == 0 or get == 0:
            continue
        for j in range(row.numel()):
            if edit.source[b, j]:
                out[b, h, i, j] = (1 - t) * row[j]
            elif edit.target[b, j]:
                out[b, h, i, j] = row[j] + t * pay * row[j] / get
    return out, out @ repeated(call.v, call)


@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("n_q", [N, 3, 1])
def test_moving_mass_equals_the_explicit_map(mask: str, n_q: int) -> None:
    """Prompts (fused) and decode steps (explicit rows), grouped heads, every mask."""
    torch.manual_seed(8)
    call = make_call(mask=mask, kind="causal", n_q=n_q, n_k=N)
    if mask == "causal" and n_q < N:  # sdpa aligns a causal rectangle at the upper left: give it as a mask
        seen = torch.arange(N) <= torch.arange(N - n_q, N)[:, None]
        call = call_of(call.q, call.k, call.v, seen[None, None], False, "causal")
    source, target = sets()
    weight = torch.rand(3, 6, n_q)
    weight[:, 1] = weight[..., :: max(2, n_q)] = 0
    edit = Redistribute(source, target, weight)
    expected, output = moved(call, edit)
    torch.testing.assert_close(expected.sum(-1), torch.ones_like(expected[..., 0]), atol=1e-12, rtol=0)
    out = attend(call, [edit])
    torch.testing.assert_close(out, output, atol=1e-7 if n_q > FEW_ROWS else 1e-12, rtol=0)
    assert torch.equal(out[weight == 0], call.output[weight == 0])
    assert torch.equal(out[2], call.output[2])


def test_fused_and_explicit_agree_in_float64() -> None:
    torch.manual_seed(9)
    call = make_call(mask="causal", kind="causal")
    source, target = sets()
    weight = torch.full((3, 6, N), 0.5)  # exact in float32
    output = moved(call, Redistribute(source, target, weight))[1]
    torch.testing.assert_close(attend(call, [Redistribute(source, target, weight)]), output, atol=1e-12, rtol=0)
    single = make_call(mask="causal", kind="causal", dtype=torch.float32)
    output = moved(single, Redistribute(source, target, weight))[1].float()
    torch.testing.assert_close(attend(single, [Redistribute(source, target, weight)]), output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask", KINDS)
def test_mass_on_keys(mask: str) -> None:
    torch.manual_seed(10)
    for n_q in (N, 2):
        call = make_call(mask="full_bool" if mask == "causal" and n_q < N else mask, n_q=n_q, n_k=N)
        source, _ = sets()
        expected = (explicit_map(call) * source[:, None, None]).sum(-1)
        torch.testing.assert_close(key_mass(call, source), expected, atol=1e-12, rtol=0)


def test_no_map_is_built_for_a_prompt() -> None:
    torch.manual_seed(11)
    call = make_call(batch=1, heads=2, kv_heads=1, n_q=301, dim=4, mask="causal", dtype=torch.float32)
    keys = torch.arange(301)[None] % 7 == 0
    edits: list[Edit] = [Redistribute(keys, ~keys, torch.ones(1, 2, 301))]
    for some in (edits, [LogitEdit(keys[:, None].float(), "signed", torch.ones(1, 301, dtype=torch.bool))]):
        with LargestTensor() as largest:
            attend(call, some)
        assert largest.numel < 301 * 301


# ---- rows of a batch -------------------------------------------------------------------------------------------------
def edits_of_rows() -> list[Edit]:
    source, target = sets()
    return [
        LogitEdit(WEIGHT, "signed", QUERIES, HEADS),
        LogitEdit(PER_HEAD, "absolute"),
        Redistribute(source, target, torch.rand(3, 6, N)),
        KeyBias(torch.randn(3, 6, 2, N), "last"),
    ]


def one_row(edit: Edit, row: int) -> Edit:
    names = ("weight", "bias", "queries", "heads", "source", "target")
    tensors = {n: getattr(edit, n, None) for n in names}
    return replace(edit, **{n: t[row : row + 1] for n, t in tensors.items() if isinstance(t, Tensor)})  # type: ignore


@pytest.mark.parametrize("number", range(4))
def test_rows_equal_solo_calls_and_permute(number: int) -> None:
    torch.manual_seed(12)
    call, edit = make_call(mask="full_bool", kind="causal"), edits_of_rows()[number]
    call.predicts = 2
    together = attend(call, [edit])
    parts = [one_row(edit, row) for row in range(3)]
    for row in range(3):
        alone = rows_of(call, slice(row, row + 1))
        alone.predicts = 2
        torch.testing.assert_close(attend(alone, [parts[row]])[0], together[row], atol=1e-12, rtol=0)
    turned = rows_of(call, [2, 0, 1])
    turned.predicts = 2
    again = attend(turned, stack_rows([[parts[row]] for row in (2, 0, 1)]))
    torch.testing.assert_close(again, together[[2, 0, 1]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("number", range(4))
def test_a_row_that_asks_for_nothing_gets_nothing(number: int) -> None:
    torch.manual_seed(13)
    call, edit = make_call(kind="causal"), edits_of_rows()[number]
    call.predicts = 2
    stacked = stack_rows([[one_row(edit, 0)], [], [one_row(edit, 1)]])
    out = attend(call, stacked)
    assert torch.equal(out[1], call.output[1])
    assert not torch.equal(out[0], call.output[0])


@pytest.mark.parametrize("number", range(4))
def test_restricted_tiled_and_repeated_rows(number: int) -> None:
    torch.manual_seed(14)
    call, edit = make_call(kind="causal"), edits_of_rows()[number]
    call.predicts = 2
    whole, plain = attend(call, [edit]), call.output
    mask = torch.tensor([[True, True, False, True, True, False], [True] * 6, [False] * 6])
    chosen = mask[..., None, None]
    limited = attend(call, [restrict(edit, mask)])
    torch.testing.assert_close(limited, torch.where(chosen, whole, plain), atol=1e-12, rtol=0)
    assert torch.equal(limited[~mask], plain[~mask])
    double = rows_of(call, [0, 1, 2, 0, 1, 2])
    double.predicts = 2
    torch.testing.assert_close(attend(double, [tile_rows(edit, 3, 2)])[3:], whole, atol=1e-12, rtol=0)
    twice = attend(double, [restrict(tile_rows(edit, 3, 2), mask, lanes=2)])
    torch.testing.assert_close(twice, torch.cat([limited, limited]), atol=1e-12, rtol=0)
    beams = rows_of(call, [0, 0, 1, 1, 2, 2])
    beams.predicts = 2
    torch.testing.assert_close(attend(beams, [edit])[1::2], whole, atol=1e-12, rtol=0)


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_wrong_shapes_are_refused() -> None:
    call = make_call(kind="causal")
    bad: dict[str, Edit] = {
        "LogitEdit.weight covers 5 keys": LogitEdit(torch.ones(1, 1, 5), "signed"),
        "LogitEdit.weight starts with shape": LogitEdit(torch.ones(2, 1, N), "signed"),
        "LogitEdit.queries has shape": LogitEdit(torch.ones(1, 1, N), "signed", torch.ones(3, 4, dtype=torch.bool)),
        "LogitEdit.heads has shape": LogitEdit(torch.ones(1, 1, N), "signed", heads=torch.ones(1, 2).bool()),
        "changes the rows that predict": LogitEdit(torch.ones(1, 1, N), "absolute", QUERIES),
        "Redistribute.source has shape": Redistribute(*(s[:2] for s in sets()), torch.ones(3, 6, N)),
        "Redistribute.weight has shape": Redistribute(*sets(), torch.ones(3, 6)),
        "1 queries predict new tokens": KeyBias(torch.ones(1, 1, 4, N), "last"),
        "or with queries='last' also": KeyBias(torch.ones(1, 1, 1, N)),
    }
    for words, edit in bad.items():
        assert any(words in reason for reason in refusals(call, edit)), (words, refusals(call, edit))
        with pytest.raises(SteeringError):
            attend(call, [edit])


def test_what_does_not_compose_is_refused() -> None:
    logit, move = LogitEdit(WEIGHT, "absolute"), Redistribute(*sets(), torch.ones(3, 6, N))
    signed, half = LogitEdit(WEIGHT, "signed", QUERIES), torch.full((1, 6), 0.5)
    for pair in (
        [logit, Mix(MeanValue(), half)],
        [logit, Segments((), torch.ones(1, 1))],
        [signed, replace(signed)],
        [move, logit],
        [move, KeyBias(WEIGHT)],
        [move, replace(move)],
        [move, Mix(MeanValue(), half)],
    ):
        assert len(conflicts(pair)) == 1, pair
    fine: list[list[Edit]] = [
        [logit, signed, KeyBias(WEIGHT), KeyBias(WEIGHT, "last"), Scale(half), Mix(OwnValue(), half)],
        [move, Scale(half), Mix(OwnValue(), half)],
    ]
    assert [conflicts(edits) for edits in fine] == [[], []]


def test_edits_held_to_different_rows_compose_without_a_look_at_their_weights() -> None:
    """Tensors on the meta device have no values."""
    move, logit = Redistribute(*sets(), torch.ones(3, 6, N)), LogitEdit(WEIGHT, "absolute")
    signed, first, others = replace(logit, form="signed"), (True, False, False), (False, True, True)
    for one, two in ((move, logit), (move, move), (signed, signed)):
        one, two = replace(one, held=first), replace(two, held=others)
        assert conflicts([map_tensors(edit, lambda tensor: tensor.to("meta")) for edit in (one, two)]) == []
        for unclear in (first, None):
            assert len(conflicts([one, replace(two, held=unclear)])) == 1
    idle = replace(move, weight=torch.zeros(3, 6, N), held=first)
    assert conflicts([idle, replace(logit, held=first)]) == []

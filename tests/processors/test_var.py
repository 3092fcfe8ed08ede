"""VAR against loops over the explicit map, the hand examples of its paper, and its life through a generation."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attnsteer
from attnsteer import AttentionCall, SteeringError, Where
from attnsteer.edits import Redistribute
from attnsteer.hosts import massive
from attnsteer.hosts.vlm_families import vision_tokens
from attnsteer.processors.var import VAR, LayerSinks, on_keys, phi, selected, sink_report
from attnsteer.site import Site
from attnsteer.spans import spans_of
from tests.calls import call_of, explicit_map, repeated
from tests.hosts.common import GREEDY
from tests.processors.prompts import N, image_and_real, in_chunks, parts_of, prompt_call, run, solo
from tests.tiny import vlms

CHANNELS = (3, 11)
LOOSE = VAR(tau=1.4, rho=0.3, floor=0.2, channels=CHANNELS)


def by_loops(var: VAR, call: AttentionCall, sinks: Tensor | None = None) -> Tensor:
    """The paper's steps, one token at a time; float64."""
    image, real = image_and_real()
    plain = explicit_map(call)
    out = plain.clone()
    for b in range(3):
        x = call.residual[b].double()
        marked = []
        for j in range(N):
            rms = math.sqrt(sum(float(c) ** 2 for c in x[j]) / x.shape[1] + 1e-6)
            if max(abs(float(x[j, d])) for d in CHANNELS) / rms > var.tau and real[b, j]:
                marked.append(j)
        visual = [j for j in marked if image[b, j]]
        others = [j for j in range(N) if image[b, j] and j not in visual]
        last = max(j for j in range(N) if image[b, j])
        for h in range(plain.shape[1]):
            for i in range(last + 1, N):
                row = plain[b, h, i]
                a_n, a_sv = sum(float(row[j]) for j in others), sum(float(row[j]) for j in visual)
                if not visual or a_n + a_sv < var.floor or a_n / (a_n + a_sv) < var.rho or a_n == 0:
                    continue
                omega = var.fraction * sum(float(row[j]) for j in marked)
                for j in marked:
                    out[b, h, i, j] = (1 - var.fraction) * row[j]
                for j in others:
                    out[b, h, i, j] = row[j] + omega * row[j] / a_n
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]), atol=1e-12, rtol=0)
    return out @ repeated(call.v, call)


# ---- hand examples ---------------------------------------------------------------------------------------------------
def row_call(weights: list[float]) -> AttentionCall:
    """One query whose attention is given; token 0 and 1 are text, 2 to 4 the image, and the query comes last."""
    k = torch.tensor(weights, dtype=torch.float64).log()[None, None, :, None]
    call = call_of(torch.ones(1, 1, 1, 1).double(), k, torch.eye(5).double()[None, None], scale=1.0, kind="causal")
    image = torch.tensor([[False, False, True, True, True, False]])
    spans = spans_of(image, torch.ones_like(image), queries=(5, 6), keys=(0, 5))
    call.spans, call.phase = spans, "decode"
    sinks = torch.tensor([[True, False, True, False, False]])
    call.state = {"positions": torch.arange(5), "sinks": sinks, "image": image[:, :5]}
    return call


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.12, 0.10, 0.08, 0.525, 0.175]),
        ({"fraction": 0.4}, [0.18, 0.10, 0.12, 0.45, 0.15]),
        ({"rho": 0.8}, [0.30, 0.10, 0.20, 0.30, 0.10]),
        ({"floor": 0.61}, [0.30, 0.10, 0.20, 0.30, 0.10]),
    ],
)
def test_the_row_of_the_paper(changes: dict[str, float], expected: list[float]) -> None:
    call = row_call([0.30, 0.10, 0.20, 0.30, 0.10])
    out = run(replace(VAR(), **changes), call)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor(expected).double(), atol=1e-7, rtol=0)
    assert changes.keys() <= {"fraction"} or torch.equal(out, call.output)


def test_phi_by_hand() -> None:
    x = torch.ones(16)
    x[3] = 10
    torch.testing.assert_close(phi(x, (3,)), torch.tensor(3.7300), atol=5e-5, rtol=0)
    x[3] = -10
    torch.testing.assert_close(phi(x, (1, 3)), torch.tensor(3.7300), atol=5e-5, rtol=0)
    alone = torch.zeros(16)
    alone[3] = 1e4
    assert phi(alone, (3,)) == pytest.approx(4, abs=1e-4)  # sqrt(16)
    assert not phi(x, ()).any()


def test_selection_needs_mass_on_what_receives() -> None:
    others, visual = torch.tensor([0.4, 0.0, 0.1]), torch.tensor([0.2, 0.5, 0.05])
    assert selected(others, visual, 0.5, 0.2).tolist() == [True, False, False]
    assert selected(others, visual, 0.0, 0.2).tolist() == [True, False, False]


def test_marks_follow_keys_that_a_window_lost() -> None:
    positions, marked = torch.arange(4), torch.tensor([[True, False, True, True]])
    assert on_keys(positions, marked, torch.arange(2, 7)).tolist() == [[True, True, False, False, False]]
    assert on_keys(positions, marked, torch.arange(6)).tolist() == [[True, False, True, True, False, False]]


# ---- whole prompts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", [False, True])
def test_a_prompt_equals_the_loops(prefix: bool) -> None:
    """Fused, with grouped heads, padding, causal and prefix order."""
    torch.manual_seed(0)
    call = prompt_call(prefix=prefix)
    out = run(LOOSE, call)
    expected = by_loops(LOOSE, call)
    torch.testing.assert_close(out, expected, atol=1e-7, rtol=0)  # 0.6 in float32
    half = replace(LOOSE, fraction=0.5)  # exact in float32
    torch.testing.assert_close(run(half, call), by_loops(half, call), atol=1e-12, rtol=0)
    changed = (out != call.output).any(-1)
    assert changed.any()
    behind = spans_of(*image_and_real()).reading.after_image  # type: ignore[union-attr]
    assert not (changed & ~behind[:, None]).any()  # rows up to the image keep their bits


def test_single_precision_is_close() -> None:
    torch.manual_seed(1)
    call = prompt_call(torch.float32)
    torch.testing.assert_close(run(LOOSE, call).double(), by_loops(LOOSE, call), atol=1e-5, rtol=0)


@pytest.mark.parametrize("off", [{"tau": math.inf}, {"rho": 1.01}, {"tau": 3.99}, {"floor": 1.0}])
def test_nothing_selected_keeps_the_bits(off: dict[str, float]) -> None:
    torch.manual_seed(2)
    call = prompt_call(torch.float32)
    assert torch.equal(run(replace(LOOSE, **off), call), call.output)
    assert not torch.equal(run(LOOSE, call), call.output)


def test_text_sinks_alone_select_nothing() -> None:
    torch.manual_seed(3)
    call = prompt_call()
    image, _ = image_and_real()
    assert call.residual is not None
    call.residual[image] = 1.0  # every channel the same: phi = 1
    assert call.residual[~image].abs().max() > 0
    assert torch.equal(run(LOOSE, call), call.output)


def test_padding_is_never_a_sink() -> None:
    torch.manual_seed(4)
    call = prompt_call()
    _, real = image_and_real()
    assert call.residual is not None
    call.residual[~real] = torch.nn.functional.one_hot(torch.tensor(3), 16) * 100.0
    run(LOOSE, call)
    assert not call.state["sinks"][~real].any()


def test_rows_equal_solo_runs() -> None:
    torch.manual_seed(5)
    call = prompt_call()
    together = run(LOOSE, call)
    for row, pad in enumerate((0, 2, 4)):
        torch.testing.assert_close(solo(LOOSE, call, row), together[row, :, pad:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("bounds", [(0, 9, N), (0, 4, 8, 12, N), (0, 14, N)])
def test_a_prompt_in_chunks_is_the_same_prompt(bounds: tuple[int, ...]) -> None:
    torch.manual_seed(6)
    call = prompt_call()
    torch.testing.assert_close(in_chunks(LOOSE, call, bounds), run(LOOSE, call), atol=1e-12, rtol=0)


def test_decode_uses_the_sinks_of_the_prompt() -> None:
    """The last tokens as generated ones: their own stream is not looked at, and the sinks stay those of the prompt."""
    torch.manual_seed(7)
    call = prompt_call()
    state: dict[str, Tensor] = {}
    first = parts_of(call, 0, N - 2, "prefill", state)
    first.predicts = 1
    assert call.residual is not None
    call.residual[:, -2:] = 1.0
    whole = run(LOOSE, call)
    assert first.residual is not None
    first.residual[:, -2:] = call.residual[:, -4:-2]
    out = run(LOOSE, first)
    torch.testing.assert_close(out, whole[:, :, :-2], atol=1e-12, rtol=0)
    both = parts_of(call, N - 2, N, "decode", state)
    both.residual = torch.full_like(both.residual, 50.0) * torch.eye(16)[3]  # type: ignore[arg-type]
    torch.testing.assert_close(run(LOOSE, both), whole[:, :, -2:], atol=1e-12, rtol=0)
    assert state["sinks"].shape == (3, N - 2)


def test_guessed_tokens_behind_a_prompt_are_no_sinks() -> None:
    torch.manual_seed(8)
    call = prompt_call()
    call.predicts = 3  # the prompt's last row and two guesses
    run(LOOSE, call)
    assert call.state["sinks"].shape == (3, N - 2)


def test_decode_without_a_prompt_is_an_error() -> None:
    call = row_call([0.2] * 5)
    call.state = {}
    with pytest.raises(SteeringError, match="has not seen this prompt"):
        VAR().react(call)


def test_a_pass_beside_the_generation_leaves_nothing() -> None:
    torch.manual_seed(9)
    call = prompt_call()
    call.lanes = {"main": slice(0, 3)}
    assert torch.equal(run(LOOSE, call), run(LOOSE, replace(call, lanes={}, state={})))
    assert "sinks" not in call.state


# ---- the massive channels --------------------------------------------------------------------------------------------
def test_published_channels_by_model() -> None:
    from transformers import LlamaConfig, LlavaConfig, Qwen2VLConfig

    class Model:
        def __init__(self, config: object):
            self.config = config

    small = LlavaConfig(text_config=LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    large = LlavaConfig(text_config=LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40))
    qwen = Qwen2VLConfig(text_config={"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28})
    found = [massive.massive_channels(Model(c), vision_tokens(c), 20.0) for c in (small, large, qwen)]
    assert found == [(1415, 2533), (2100, 4743), (458, 2570)]


def loud(name: str, channel: int = 7) -> tuple[object, object]:
    """A tiny model whose embeddings are massive in one channel."""
    model, make = vlms.build(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, channel] = 30.0
    return model, make


@pytest.mark.parametrize("name", ["llava", "qwen25", "gemma3", "paligemma"])
def test_unlisted_models_are_measured_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, make = loud(name)
    measured = []
    plain = massive._first_token_ratios
    monkeypatch.setattr(massive, "_first_token_ratios", lambda *a: measured.append(1) or plain(*a))
    inputs = make(1)  # type: ignore[operator]
    var = VAR(tau=4.0, floor=0.0, rho=0.0)  # sqrt(48) = 6.9
    expected = model(**inputs).logits  # type: ignore[operator]
    for _ in range(2):
        with attnsteer.steer(model, var) as steering:
            model(**inputs)  # type: ignore[operator]
            states = steering.states(var)
            assert {state["massive_channels"] for state in states.values()} == {(7,)}
            assert all(layer.counts[0][1] > 0 for layer in sink_report(states))  # the text alone is massive
    assert measured == [1]
    assert torch.equal(model(**inputs).logits, expected)  # type: ignore[operator]


@pytest.mark.parametrize("way", ["in place", "data", "state dict"])
def test_weights_that_changed_are_measured_again(way: str) -> None:
    model, make = vlms.build("llava")
    weight, var = model.get_input_embeddings().weight, VAR(tau=4.0, floor=0.0, rho=0.0)
    with torch.no_grad():
        weight[:, 7] = 30.0

    def channels() -> set[tuple[int, ...]]:
        with attnsteer.steer(model, var) as steering:
            model(**make(1))
            return {state["massive_channels"] for state in steering.states(var).values()}

    assert channels() == {(7,)}
    other = weight.detach().roll(13, 1)
    with torch.no_grad():
        if way == "in place":
            weight.copy_(other)
        elif way == "data":  # as adapters are merged
            weight.data += other - weight.data
        else:
            name = next(n for n, p in model.named_parameters() if p is weight)
            model.load_state_dict({**model.state_dict(), name: other})
    assert channels() == {(20,)}


def test_a_model_without_massive_channels_warns() -> None:
    model, _ = vlms.build("llava")
    with pytest.warns(UserWarning, match="No channel of this model"), attnsteer.steer(model, VAR(tau=4.1)):
        pass


def test_a_threshold_that_the_width_cannot_reach_warns() -> None:
    site = Site("layers.0.self_attn", "causal", 0, 0, 4, 2, 8, width=896)
    with pytest.warns(UserWarning, match=r"choose tau below 18"):
        VAR().where_for([site])
    VAR(tau=17.0).where_for([site])


def test_an_infinite_threshold_is_off_and_says_nothing() -> None:
    """Attached to a model whose channels are not known, it measures none."""
    model, make = vlms.build("llava")
    inputs = make(2)
    plain = model(**inputs).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attnsteer.steer(model, VAR(tau=math.inf)):
            assert torch.equal(model(**inputs).logits, plain)
    assert VAR(tau=math.inf).inert


# ---- models ----------------------------------------------------------------------------------------------------------
TINY = replace(LOOSE, where=Where(layers="all"), tau=1.2, floor=0.05, rho=0.1)


def test_default_layers_leave_out_two_at_the_front_and_one_at_the_end() -> None:
    sites = [Site(f"{i}", "causal", i, i, 4, 2, 8) for i in range(32)]
    assert VAR().where_for(sites).layers == list(range(2, 31))


def test_a_report_says_where_the_sinks_are() -> None:
    model, make = vlms.build("llava")
    inputs = make(3, left_padding=True)
    with attnsteer.steer(model, TINY) as steering:
        assert sink_report(steering.states(TINY)) == ()
        seen: list[Tensor] = []
        layer = model.get_submodule("model.language_model.layers.2")
        handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(**inputs)
        handle.remove()
        report = sink_report(steering.states(TINY))
    assert [layer.layer for layer in report] == [0, 1, 2, 3]
    marked = (phi(seen[0], CHANNELS) > TINY.tau) & inputs["attention_mask"].bool()
    image = inputs["input_ids"] == vlms.IMAGE
    rows = [tuple(tuple(torch.nonzero(m)[:, 0].tolist()) for m in marks) for marks in (marked & image, marked & ~image)]
    assert report[2] == LayerSinks(2, *rows)
    assert report[2].counts == tuple((len(a), len(b)) for a, b in zip(*rows, strict=True))


def test_nothing_leaks_from_one_prompt_to_the_next() -> None:
    model, make = vlms.build("llava")
    first, second = make(2, seed=1), make(2, seed=2, left_padding=True)
    with attnsteer.steer(model, TINY) as steering:
        expected = model.generate(**second, **GREEDY)
        report = sink_report(steering.states(TINY))
    with attnsteer.steer(model, TINY) as steering:
        model.generate(**first, **GREEDY)
        assert sink_report(steering.states(TINY)) != report
        assert torch.equal(model.generate(**second, **GREEDY), expected)
        assert sink_report(steering.states(TINY)) == report


def test_decode_alone_looks_at_the_prompt_but_leaves_it() -> None:
    model, make = vlms.build("llava")
    inputs = make(2)
    late = replace(TINY, where=Where(layers="all", steps="decode"))
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    with attnsteer.steer(model, late):
        steered = model.generate(**inputs, **options)
    assert torch.equal(plain.logits[0], steered.logits[0])
    assert not torch.equal(plain.logits[1], steered.logits[1])


def test_a_cache_filled_before_is_refused() -> None:
    model, make = vlms.build("llava")
    inputs = make(1)
    cache = model(**inputs, use_cache=True).past_key_values
    longer = {"input_ids": torch.cat([inputs["input_ids"], torch.full((1, 2), 9)], 1)}
    with (
        attnsteer.steer(model, TINY),
        pytest.raises(SteeringError, match="call generate\\(\\) without past_key_values"),
    ):
        model.generate(**longer, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"tau": -1}, "tau=-1"),
        ({"tau": math.nan}, "tau=nan"),
        ({"rho": -0.1}, "rho=-0.1"),
        ({"floor": 2}, "floor=2"),
        ({"channels": ()}, "channels=()"),
        ({"channels": (1.5,)}, "channels=(1.5,)"),
    ],
)
def test_wrong_parameters(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(SteeringError) as caught:
        VAR(**wrong)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_a_channel_beyond_the_width_is_refused() -> None:
    model, _ = vlms.build("llava")
    with pytest.raises(SteeringError, match="residual stream of width 48"):
        attnsteer.attach(model, VAR(tau=2.0, channels=(48,)))


def test_the_edit_names_disjoint_sets() -> None:
    torch.manual_seed(10)
    edit = LOOSE.react(prompt_call())
    assert isinstance(edit, Redistribute)
    assert not (edit.source & edit.target).any()
    assert edit.weight.unique().tolist() == pytest.approx([0.0, 0.6])

"""The dry run: what it says about fork, memory, rows and refusals, against hand counts and against real runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

import attnsteer
from attnsteer import Where, explain
from attnsteer.fork import Tape, _tensors
from attnsteer.hosts.diffusion import DiffusionSession
from attnsteer.processors import PAG, SEG, ConsistentSelfAttention, SharedSelfAttention, SoftPAG
from tests.engine.common import Nudge
from tests.tiny import pipelines

SHAPE = {"height": pipelines.HEIGHT, "width": pipelines.WIDTH}
STAGES = {
    # family: (layers of the processor, stage of the fork, shared stages, stages)
    "sd15": ([2], "up_blocks.1", 4, 5),
    "sd3": ([2, 3], "transformer_blocks.2", 2, 4),
    "flux": ([3], "single_transformer_blocks.1", 3, 5),
    "wan": ([1], "blocks.1", 1, 3),
}


@pytest.mark.parametrize("name", STAGES)
def test_the_fork_is_where_a_hand_count_puts_it(name: str) -> None:
    layers, stage, shared, total = STAGES[name]
    found = explain(pipelines.build(name), SoftPAG(Where(layers=layers)), **SHAPE)
    assert found.fork == f"enters before {stage}: {shared} of {total} stages are shared"
    assert found.shared == shared / total
    assert found.extra_rows == 1
    assert found.refused == []
    assert json.loads(json.dumps(found.to_dict()))["fork"] == found.fork
    assert stage in str(found)


def test_nothing_is_shared_from_the_first_stage_on() -> None:
    found = explain(pipelines.build("sd3"), PAG(Where(layers=0)), **SHAPE)
    assert found.fork == "nothing is shared: the first stage is perturbed"
    assert (found.shared, "tape" in found.bytes) == (0.0, False)


def held_by_the_tape(pipe: Any, name: str, monkeypatch: pytest.MonkeyPatch, **call: Any) -> tuple[int, int]:
    """Bytes (of each memory once) that the tape held in a run when it was replayed, and the text tokens of the run."""
    sizes, text = [], []
    replaying = Tape.replaying

    def measured(self: Tape, *args: Any) -> Any:
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(self._outputs)}
        sizes.append(sum(kept.values()))
        return replaying(self, *args)

    def note(module: Any, args: Any, kwargs: Any) -> None:
        text.append(kwargs["encoder_hidden_states"].shape[1])

    monkeypatch.setattr(Tape, "replaying", measured)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    pipe(**pipelines.call_kwargs(name, steps=1, **call))
    handle.remove()
    return sizes[0], text[0]


@pytest.mark.parametrize(
    ("name", "layers", "batch"),
    [("sd15", [1], 1), ("sd15", [2], 2), ("sdxl", [1], 1), ("sd3", [2], 1), ("sd3", [2], 2), ("sd35", [1], 1)],
)
def test_the_tape_takes_as_much_as_was_said(
    name: str, layers: list[int], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipelines.build(name)
    with attnsteer.steer(pipe, SoftPAG(Where(layers=layers))) as steering:
        held, text = held_by_the_tape(pipe, name, monkeypatch, batch=batch)
        assert steering.explain(**SHAPE, batch=batch, text=text).bytes["tape"] == held


def test_several_forks_are_told_with_their_rows_and_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.build("sd3")
    layers = [3, 1, 0, 1, 3]
    with attnsteer.attach(pipe, variants=[None, *(SoftPAG(Where(layers=n)) for n in layers)]) as steering:
        held, text = held_by_the_tape(pipe, "sd3", monkeypatch, batch=6)
        found = steering.explain(**SHAPE, text=text)
    assert found.fork == (
        "nothing is shared: the first stage is perturbed (1 of 5 rows); "
        "enters before transformer_blocks.1: 1 of 4 stages are shared (2 of 5 rows); "
        "enters before transformer_blocks.3: 3 of 4 stages are shared (2 of 5 rows)"
    )
    assert found.shared == sum(layers) / 5 / 4
    assert found.extra == "in each guided step 3 more forwards of conditional rows (1 for each picture)"
    assert found.bytes["tape"] == held


@pytest.mark.parametrize("name", ["flux", "pixart", "qwen"])
def test_the_tape_takes_no_more_than_twice_as_much_as_was_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.build(name)
    processor = SoftPAG(Where(layers=[-1]))
    with attnsteer.steer(pipe, processor):
        held, text = held_by_the_tape(pipe, name, monkeypatch)
    said = explain(pipe, processor, **SHAPE, text=text).bytes["tape"]
    assert held <= said <= 2 * held  # these pipelines may run the two branches of guidance one after the other


SHARING = {
    "sd15": SharedSelfAttention(Where("up_blocks*.attn1"), frames=2),
    "sdxl": SharedSelfAttention(Where("up_blocks*.attn1"), frames=2, words=("dog",)),  # cross-attention lends as well
    "sd3": ConsistentSelfAttention(Where(layers=[1, 2]), frames=2),
    "flux": ConsistentSelfAttention(Where(layers=[1, -1]), frames=2),
}


@pytest.mark.parametrize("name", SHARING)
def test_loans_take_as_much_as_was_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, guided = pipelines.build(name), SoftPAG(Where(layers=[2]))
    held, text, perturbed = [], [], DiffusionSession._perturbed

    def measured(self: Any, forward: Any, *args: Any) -> Any:
        tensors = [x for loan in forward.loans.values() for x in (loan.tensors["k"], loan.tensors["v"])]
        held.append(sum(x.numel() * x.element_size() for x in tensors) // forward.inputs[sample].shape[0])
        text.append(forward.inputs["encoder_hidden_states"].shape[1])
        return perturbed(self, forward, *args)

    sample = "sample" if hasattr(pipe, "unet") else "hidden_states"
    monkeypatch.setattr(DiffusionSession, "_perturbed", measured)
    with attnsteer.steer(pipe, SHARING[name], guided):
        pipe(**{**pipelines.call_kwargs(name, batch=2, steps=1), "prompt": ["a dog"] * 2})
    found = explain(pipe, SHARING[name], guided, **SHAPE, batch=2, text=text[0])
    assert found.bytes["loans"] == 4 * held[0] > 0  # two pictures, both branches of guidance
    assert "loans" not in explain(pipe, guided, **SHAPE).bytes
    assert "loans" not in explain(pipe, SHARING[name], **SHAPE).bytes


def test_further_forwards_are_told() -> None:
    method = SharedSelfAttention(frames=2, queries=(0.9, 0.8))
    found = explain(pipelines.build("sd15"), method, PAG(Where(layers=[2])), **SHAPE)
    assert found.extra.startswith("in about 12 % of the steps one more, plain forward of all rows")
    assert found.extra.endswith("one more forward of the conditional rows (1 for each picture)")
    assert found.extra_rows == 3
    assert explain(pipelines.build("sd15"), SharedSelfAttention(frames=2)).extra == "none"


def test_bytes_of_edits_count_every_processor() -> None:
    pipe = pipelines.build("sd3")
    guided, other = SoftPAG(Where(layers=2)), Nudge()
    sizes = [explain(pipe, *some, **SHAPE).bytes["edits"] for some in ([guided], [other], [guided, other])]
    assert sizes == [4 * 3, 4 * 4 * 3, 4 * 5 * 3]  # float32 weights of 3 heads at 1, 4 and 5 sites


def test_rows_and_inert_parts_are_told() -> None:
    pipe = pipelines.build("sd3")
    both, off = [SoftPAG(Where(layers=2)), SEG(Where(layers=1))], PAG(scale=0.0)
    found = explain(pipe, variants=[None, both, off], **SHAPE)
    assert found.rows == [[], [0, 1], [2]]
    assert found.extra_rows == 2
    assert [part.inert for part in found.parts] == [False, False, True]
    assert "no effect: the model is left alone" in str(found)
    only = explain(pipe, off)
    assert (only.extra, only.extra_rows, only.fork, only.shared) == ("none", 0, "", 0.0)


def test_variants_take_a_tape_of_their_rows() -> None:
    pipe, processor = pipelines.build("sd3"), SoftPAG(Where(layers=2))
    one, three = (explain(pipe, variants=[processor] * n, **SHAPE).bytes["tape"] for n in (1, 3))
    assert three == 3 * one


def test_refusals_are_collected() -> None:
    pipe = pipelines.build("sd3")
    found = explain(pipe, PAG(Where(layers=9)), SoftPAG(Where(heads=7)), scheduler=pipe.scheduler)
    for reason, expected in zip(found.refused, ("Layer 9", "Head 7", "scheduler= is"), strict=True):
        assert expected in reason
        assert f"refused  {reason}" in str(found)
    assert explain(pipe).refused == ["Nothing to attach: give at least one processor."]
    assert explain(pipe, 3).refused[0].startswith("3 is not an attnsteer processor")  # type: ignore[arg-type]
    assert "cannot be steered" in explain(object(), PAG()).refused[0]
    with pytest.raises(TypeError, match="not depth"):
        explain(pipe, PAG(), depth=3)


def test_what_is_steered_already_is_refused_as_attach_refuses_it() -> None:
    pipe = pipelines.build("sd3")
    with attnsteer.steer(pipe, PAG()) as steering:
        with pytest.raises(attnsteer.SteeringError) as error:
            attnsteer.attach(pipe, PAG())
        assert explain(pipe, PAG()).refused == error.value.reasons
        assert steering.explain().refused == []
    assert explain(pipe, PAG()).refused == []

"""benchmarks/speed on language models, processes and growth: every script in its tiniest setting; never a time."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed"
MODULES = ("measure", "models", "tellers", "plots", "decoding", "compare", "processes", "scale")
ONCE = ["--repeats", "1", "--warm-up", "0", "--log"]


@pytest.fixture
def speed(monkeypatch, tmp_path):
    """The folder of the scripts, whose logs go elsewhere."""
    monkeypatch.syspath_prepend(str(SPEED))
    import measure

    monkeypatch.setattr(measure, "LOGS", tmp_path)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def checked(folder: Path, job: str) -> dict:
    """A log whose ratios are numbers of cases that it has."""
    found = json.loads((folder / f"{job}-cpu.json").read_text())
    assert found["job"] == job
    assert all(case["raw_s"] and case["median_s"] > 0 for case in found["cases"].values())
    for ratio in found["ratios"]:
        assert {ratio["case"], ratio["to"]} <= set(found["cases"])
        assert all(math.isfinite(ratio[name]) for name in ("ratio", "low", "high"))
    return found


@pytest.mark.parametrize(
    ("name", "pictures"), [("llava-7b", 1), pytest.param("qwen2.5-vl-7b", 1, marks=pytest.mark.slow)]
)
def test_prompts_are_as_long_as_asked_and_mostly_image(speed, name, pictures):
    import tellers

    teller = tellers.build(name, "cpu", "float32", scale=16, prompt=700)
    assert teller.inputs["input_ids"].shape == (1, 700)
    assert teller.settings["pictures"] == pictures
    assert 0.5 < teller.image_tokens / 700 < 0.95
    ids = teller.inputs["input_ids"][0]
    image = (ids == teller.model.config.image_token_id).nonzero().flatten()
    assert image[-1] < 700 - tellers.QUESTION, "a question stands behind the image"
    with torch.no_grad():
        out = teller.model.generate(**teller.inputs, max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 702)


def test_layouts_at_full_size_are_the_published_ones(speed, monkeypatch):
    """Numbers of parameters, on the meta device."""
    import tellers

    monkeypatch.setattr(tellers, "_words", lambda count, device: torch.zeros(count, dtype=torch.long, device=device))
    monkeypatch.setattr(tellers.Teller, "image_tokens", 0)
    with torch.device("meta"):
        for name, billions in (("llava-7b", 7.06), ("qwen2.5-vl-7b", 8.29)):
            teller = tellers.build(name, "meta", "bfloat16", prompt=2048)
            assert sum(p.numel() for p in teller.model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_decoding_compares_four_methods_with_plain_and_with_maps(speed):
    import decoding

    decoding.main([*ONCE, "--model", "llava-7b", "--scale", "16", "--prompt", "700", "--tokens", "3"])
    found = checked(speed, "decoding-llava-7b")
    for name in ("plain", decoding.MAPS, *decoding.DECODE):
        assert {name, f"{name}: prefill", f"{name}: decode"} <= set(found["cases"])
    assert found["cases"]["VAR"]["peak_bytes"] < found["cases"][decoding.MAPS]["peak_bytes"]
    assert {r["case"]: r["most"] for r in found["ratios"] if r["to"] == "plain: decode"} == {
        f"{name}: decode": most for name, most in decoding.DECODE.items()
    }


def test_var_finds_sinks_and_redistributes_heads(speed):
    """Otherwise its time would be that of nothing."""
    import decoding
    import tellers

    teller = tellers.build("llava-7b", "cpu", "float32", scale=16, prompt=700)
    told = decoding.proof(teller, decoding.methods(teller)["VAR"])
    sinks = int(told.split(": ")[1].split()[0])
    heads, calls = told.split("; ")[1].split()[0:3:2]
    assert 0 < sinks < 100
    assert 0 < int(heads) <= int(calls)


def test_idle_compares_neutral_attachments_with_plain(speed):
    import decoding

    decoding.main([*ONCE, "--idle", "--model", "world-llava", "--tokens", "3"])
    found = checked(speed, "idle-world-llava")
    assert all(ratio["most"] == 1.02 for ratio in found["ratios"])
    assert {ratio["to"] for ratio in found["ratios"]} == {"plain: prefill", "plain: decode"}


@pytest.mark.parametrize("task", [pytest.param("chair", marks=pytest.mark.slow), "pope"])
def test_compare_takes_five_methods_at_once_and_apart(speed, task, capsys):
    import compare

    compare.main([*ONCE, "--task", task, "--samples", "1", "--tokens", "2"])
    found = checked(speed, f"compare-world-llava-{task}")
    assert list(found["cases"]) == [compare.TOGETHER, compare.APART, compare.WIDE]
    assert found["settings"]["methods"].count(",") == 4
    assert found["ratios"][0]["least"] == 1.3
    assert "answers a second" in capsys.readouterr().out


def test_a_failed_answer_is_no_measurement(speed, monkeypatch):
    import compare

    def fails(self, samples, methods, limit):
        raise ValueError("no")

    monkeypatch.setattr(compare.Answerer, "__call__", fails)
    with pytest.raises(RuntimeError, match="not answered: ValueError: no"):
        compare.main([*ONCE, "--samples", "2", "--tokens", "2"])


def test_a_layout_with_random_weights_can_be_compared_in_words(speed):
    import compare

    few = ["--samples", "1", "--tokens", "2", "--method", "baseline", "--method", "pai"]
    compare.main([*ONCE, "--model", "llava-7b", "--scale", "16", *few])
    checked(speed, "compare-llava-7b-chair")


@pytest.mark.slow
def test_a_static_cache_is_a_log_of_its_own(speed):
    import decoding

    decoding.main([*ONCE, "--static", "--model", "world-llava", "--tokens", "3"])
    assert checked(speed, "decoding-world-llava-static")["settings"]["cache"] == "static"


@pytest.mark.slow
@pytest.mark.parametrize("job", ["compare", "search"])
def test_processes_share_the_work(speed, job):
    import processes

    processes.main([*ONCE, "--job", job, "--samples", "2", "--steps", "1", "--batch-size", "1"])
    found = checked(speed, f"processes-{job}")
    assert list(found["cases"]) == ["1 process", "2 processes"]


def test_a_process_that_dies_is_an_error_and_not_a_wait(speed, monkeypatch):
    import processes

    monkeypatch.setattr(processes, "_launcher", lambda count: ["-c", "raise SystemExit('died')"])
    with pytest.raises(RuntimeError, match="died"):
        processes.main([*ONCE, "--job", "compare", "--processes", "1"])


@pytest.mark.parametrize("over", ["tokens", "variants", pytest.param("sites", marks=pytest.mark.slow)])
def test_growth_is_measured_and_drawn(speed, over, monkeypatch):
    import scale

    monkeypatch.setattr(scale, "PLOTS", speed / "plots")
    sizes = ["256", "512"] if over == "tokens" else ["1", "2"]
    scale.main([*ONCE, "--over", over, "--sizes", *sizes, "--tokens", "128"])
    found = checked(speed, f"scale-{over}")
    assert len(found["cases"]) == 2 * len(found["settings"]["curves"])
    assert (speed / "plots" / f"scale-{over}-cpu.png").stat().st_size < 40_000
    aims = {ratio["most"] for ratio in found["ratios"]}
    assert aims == ({None, 2.0} if over == "variants" else {None})

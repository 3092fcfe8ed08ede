"""benchmarks/speed on pipelines: every script runs, at the smallest size; peers do the same as attnsteer. No times."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import attnsteer
from attnsteer.processors import PAG

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed"
SCRIPTS = ("guidance", "idle", "maps", "nursing", "search", "sharing", "variants")
ONCE = ["--repeats", "1", "--warm-up", "0"]


@pytest.fixture
def speed(monkeypatch, tmp_path):
    """``speed(name)`` imports a script, whose logs then go to a temporary folder."""
    monkeypatch.syspath_prepend(str(SPEED))
    monkeypatch.setattr(importlib.import_module("measure"), "LOGS", tmp_path)
    yield importlib.import_module
    for name in (*SCRIPTS, "measure", "models"):  # their names are common words
        sys.modules.pop(name, None)


def run(speed, folder, name, *arguments):
    """The log of one job, as written."""
    found = speed(name).main([*ONCE, "--log", *arguments])
    found = found[0] if isinstance(found, list) else found
    assert json.loads((folder / f"{found['job']}-cpu.json").read_text()) == found
    assert all(len(case["raw_s"]) == 1 and case["raw_s"][0] > 0 for case in found["cases"].values())
    assert found["ratios"]
    assert all(math.isfinite(ratio["ratio"]) and ratio["ratio"] > 0 for ratio in found["ratios"])
    return found


def ratio(log, case, to, what="time"):
    return next(r for r in log["ratios"] if (r["case"], r["to"], r["what"]) == (case, to, what))


# ---- scripts ---------------------------------------------------------------------------------------------------------
def test_idle(speed, tmp_path):
    log = run(speed, tmp_path, "idle", "--model", "world-sd3", "--steps", "1")
    idle = ("strength 0", "steps that never come")
    assert set(log["cases"]) == {"plain", *idle, *(f"{case}: attached" for case in idle)}
    assert [r["most"] for r in log["ratios"]] == [1.02, 1.02, None, None]


def test_guidance(speed, tmp_path):
    log = run(speed, tmp_path, "guidance", "--model", "world-sd3", "--steps", "1")
    assert log["settings"]["f"] == pytest.approx(0.5, abs=0.1)  # 3 of 6 layers, and what is before and behind them
    assert ratio(log, "PAG", "plain")["most"] == pytest.approx(1.03 * (2 - log["settings"]["f"]), abs=1e-3)
    assert log["cases"]["PAG"]["peak_bytes"] > 0


def test_nursing(speed, tmp_path):
    log = run(speed, tmp_path, "nursing", "--scale", "0.125", "--size", "128", "--steps", "1")
    assert ratio(log, "Attend-and-Excite", "Attend-and-Excite of diffusers", "memory")["reached"]


def test_sharing(speed, tmp_path):
    log = run(speed, tmp_path, "sharing", "--scale", "0.2", "--size", "256", "--every", "23")
    assert log["settings"]["layers"] == 3
    wide, narrow = (f"IR-Diffusion, a layer of {n} tokens" for n in (256, 64))
    assert ratio(log, wide, narrow, "memory")["ratio"] == pytest.approx(4, rel=0.05)


def test_variants(speed, tmp_path):
    log = run(speed, tmp_path, "variants", "--model", "world-sd3", "--steps", "1", "--count", "2")
    assert ratio(log, "one by one", "in one batch")["least"] == 1.0


def test_search(speed, tmp_path):
    arguments = ["--model", "world-sd3", "--steps", "1", "--candidates", "2", "--batch", "2"]
    assert len(run(speed, tmp_path, "search", *arguments)["cases"]) == 3


def test_maps(speed, tmp_path):
    log = run(speed, tmp_path, "maps", "--model", "world-sd3", "--steps", "5")
    words, stored = (f"{way}, 1 layers, 1 steps" for way in ("words", "full maps"))
    assert ratio(log, "words, 6 layers, 1 steps", words, "memory")["ratio"] < 1.1
    assert ratio(log, "full maps, 2 layers, 1 steps", stored, "memory")["ratio"] > 1


# ---- peers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "how", "scale"), [("world-sd", "full", 3.0), ("sd3", "image_logit", 1.0)])
def test_diffusers_pag_pipeline_paints_the_same(speed, name, how, scale):
    models, guidance = speed("models"), speed("guidance")
    pipe = models.build(name, scale=1 / 24)
    where, layer = guidance.middle(pipe)
    plain = models.painter(pipe, 64, 2, scale)
    peer = models.painter(guidance.pag_pipeline(pipe, layer), 64, 2, scale, pag_scale=3.0)
    ours = models.steered(plain, pipe, PAG(where, variant=how))
    torch.testing.assert_close(ours(), peer(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(guidance.without_fork(ours)(), peer(), rtol=1e-3, atol=1e-4)
    assert float((plain() - peer()).abs().max()) > 3e-3


def test_diffusers_attend_and_excite_pipeline_paints_the_same(speed):
    models, nursing = speed("models"), speed("nursing")
    cases = nursing.cases_of(models.build("sd15", scale=0.125), 128, 1)
    ours, peer = cases["Attend-and-Excite"](), cases["Attend-and-Excite of diffusers"]()
    torch.testing.assert_close(ours, peer, rtol=1e-3, atol=1e-3)
    assert not torch.equal(ours, cases["plain"]())


def test_explicit_maps_of_ir_diffusion_give_the_same(speed):
    sharing = speed("sharing")
    layers, method = sharing.layers_of(256, 0.2, "cpu", "float32"), sharing.method(256)
    peers = sharing.ByMaps(method), sharing.ByMaps(method, dense=True)
    for layer in (layers[0], layers[1], layers[100], layers[-1], layers[-2]):
        found = sharing.steered(layer, method)
        assert not torch.allclose(found, sharing.plain(layer.q, layer.k, layer.v), atol=1e-2)
        for peer in peers:
            torch.testing.assert_close(found, peer(layer), rtol=1e-4, atol=1e-5)


def test_stored_maps_are_those_of_the_chosen_layers(speed):
    models, maps = speed("models"), speed("maps")
    pipe = models.build("world-sd3")
    with torch.no_grad():
        kept = maps.runs(pipe, 64)["full maps"](2, 3)
    assert len(kept) == 2 * 3
    torch.testing.assert_close(kept[0].sum(-1), torch.ones_like(kept[0][..., 0]))


# ---- models ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "layers", "millions"),
    [("sd15_unet", 16, 860), ("sdxl_unet", 70, 2567), ("sd3_transformer", 24, 2028), ("flux_transformer", 57, 11901)],
)
def test_denoisers_are_as_large_as_the_published_ones(speed, name, layers, millions):
    with torch.device("meta"):
        made = getattr(speed("models"), name)()
    assert 1 + max(site.layer for site in attnsteer.sites(made)) == layers
    assert round(sum(weight.numel() for weight in made.parameters()) / 1e6) == millions


def test_flops_of_fused_attention_are_counted(speed):
    guidance = speed("guidance")
    x = torch.randn(2, 3, 16, 8)
    with torch.no_grad():
        total, _ = guidance.flops(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x), None, [])
    assert total == 4 * 2 * 3 * 16 * 16 * 8


def test_peak_bytes_is_what_lives_at_once(speed):
    measure = speed("measure")

    def run():
        first = torch.zeros(2**18)
        del first
        second = torch.zeros(2**18)
        return second + 1

    assert measure.peak_bytes(run, "cpu") == pytest.approx(2 * 2**20, abs=100)  # of the scalar, too

"""Training can be killed and resumed without a trace; what it exports loads with stock classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from attnsteer.world import sampling
from attnsteer.world.train import data, flux, loop, muon, pictures, sd, sd3, vae

TINY = {
    "vae": ["--width", "8", "--batch", "2"],
    "sd": ["--channels", "8", "16", "--heads", "1", "2", "--batch", "2", "--bank", "6"],
    "flux": ["--double", "1", "--single", "2", "--heads", "2", "--head-dim", "10", "--batch", "2", "--bank", "6"],
    "sd3": ["--blocks", "2", "--heads", "2", "--head-dim", "8", "--batch", "2", "--bank", "6"],
}
MAINS = {"vae": vae.main, "sd": sd.main, "sd3": sd3.main, "flux": flux.main}
PICTURES = ("sd", "sd3", "flux")


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    model = vae.build(8)
    model.register_to_config(scaling_factor=2.0, shift_factor=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, and no measuring of thousands of scenes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(vae, "measure", lambda model, count=0, device="": (0.1, 0.5, 0.0))
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", TINY)
def test_resumed_run_equals_uninterrupted_run(name: str, tmp_path: Path, tiny_vae: Path) -> None:
    def run(folder: str, steps: int, *more: str) -> dict[str, torch.Tensor]:
        places = ["--out", str(tmp_path / folder / "model"), "--run", str(tmp_path / folder / "run")]
        places += ["--vae", str(tiny_vae)] if name in PICTURES else []
        # the schedule must not depend on where the run stopped: no decay, no warm-up
        plain = ["--steps", str(steps), "--decay", "0", "--warmup", "1", "--threads", "1"]
        MAINS[name]([*TINY[name], *places, *plain, *more])
        files = sorted((tmp_path / folder / "model").rglob("*.safetensors"))
        return {f"{file.parent.name}/{key}": value for file in files for key, value in load_file(file).items()}

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, "--resume")
    assert whole.keys() == parts.keys() and len(whole) > 10
    for key in whole:
        assert torch.equal(whole[key], parts[key]), key


def test_muon_equals_torchs_but_for_its_rounding() -> None:
    """torch's does the Newton-Schulz steps in bfloat16: 8 bits, so orthogonal matrices differ by about 1 %."""
    torch.manual_seed(0)
    ours = [torch.randn(*shape, requires_grad=True) for shape in ((12, 30), (12, 30), (30, 12))]
    theirs = [weight.detach().clone().requires_grad_() for weight in ours]
    settings = {"lr": 0.1, "weight_decay": 0.1}
    steppers = muon.Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for stepper in steppers:
            stepper.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=0.02)
    singular = torch.linalg.svdvals(muon.orthogonal(torch.randn(2, 12, 30)))
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_takes_convolutions_as_matrices() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(6, 4, 3, 3, requires_grad=True)
    flat = kernel.detach().flatten(1).clone().requires_grad_()
    kernel.grad = torch.randn_like(kernel)
    flat.grad = kernel.grad.flatten(1).clone()
    for weight in (kernel, flat):
        muon.Muon([weight], lr=0.1).step()
    assert torch.equal(kernel.detach().flatten(1), flat.detach())


def test_flux_packs_and_counts_as_its_pipeline() -> None:
    latents = torch.randn(2, 8, 16, 16)
    assert torch.equal(flux.pack(latents), FluxPipeline._pack_latents(latents, 2, 8, 16, 16))
    theirs = FluxPipeline._prepare_latent_image_ids(2, 8, 8, "cpu", torch.float32)
    assert torch.equal(flux.positions(8), theirs)


def test_no_training_scene_of_pictures_has_a_held_out_pair() -> None:
    drawn = [pictures.bank_scene(0, number) for number in range(300)]
    assert {sampling.split_of_scene(scene) for scene in drawn} == {"train"}
    assert sum(len(scene.categories) > 1 for scene in drawn) > 100


def test_schedule_rises_stays_and_falls() -> None:
    factors = [loop.schedule(step, 100, 10, 0.5) for step in range(100)]
    assert factors[0] == 0.1 and factors[10] == factors[49] == 1.0
    assert factors[75] == 0.5 and factors[99] == 0.02


def test_one_weighted_zero_token_equals_many(tiny_vae: Path) -> None:
    """log n on the logits of one zero token is the same as n zero tokens."""
    words = pictures.tokenizer()
    torch.manual_seed(0)
    model = sd3.Painter(len(words), 2, 2, 8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stock = dict(model.transformer.attn_processors)
    latents, time = torch.randn(2, 8, 16, 16), torch.tensor([300.0, 700.0])
    tokens = words(["a dog", "two cats"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        model.transformer.set_attn_processor(sd3.BiasedAttention())
        ours, _ = model(latents, time, tokens, torch.tensor([5.0, 5.0]))
        model.transformer.set_attn_processor(stock)
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in model.encoders]
        sequence = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        theirs = model.transformer(
            hidden_states=latents,
            timestep=time,
            encoder_hidden_states=torch.nn.functional.pad(sequence, (0, 0, 0, 5)),
            pooled_projections=torch.cat([output.text_embeds for output in outputs], -1),
        ).sample
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_patch_labels_are_the_categories_on_the_patches() -> None:
    scene = sampling.compose(["dog", "bus"], seed=1)
    labels = data.patch_labels([scene])[0].reshape(8, 8)
    assert set(labels.unique().tolist()) == {0, data.NUMBER["dog"], data.NUMBER["bus"]}
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        assert labels[(top + bottom) // 16, (left + right) // 16] == data.NUMBER[thing.name]


def test_unknown_model_name_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attnsteer.world.train", "gan"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "choose vae, sd, sd3, flux, llava" in done.stderr

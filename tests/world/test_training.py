"""Training can be killed and resumed without a trace; what it exports loads with stock classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnsteer.world import sampling, text
from attnsteer.world.train import llava, loop, sd3, vae

TINY = {
    "vae": ["--width", "8", "--batch", "2"],
    "sd3": ["--blocks", "2", "--heads", "2", "--head-dim", "8", "--batch", "2", "--bank", "6"],
    "llava": ["--layers", "2", "--heads", "2", "--width", "32", "--batch", "2", "--turns", "2"]
    + ["--tower-steps", "2", "--prior-steps", "0"],
}
MAINS = {"vae": vae.main, "sd3": sd3.main, "llava": llava.main}


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
        places += ["--vae", str(tiny_vae)] if name == "sd3" else []
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


def test_schedule_rises_stays_and_falls() -> None:
    factors = [loop.schedule(step, 100, 10, 0.5) for step in range(100)]
    assert factors[0] == 0.1 and factors[10] == factors[49] == 1.0
    assert factors[75] == 0.5 and factors[99] == 0.02


def test_one_weighted_zero_token_equals_many(tiny_vae: Path) -> None:
    """log n on the logits of one zero token is the same as n zero tokens."""
    words = sd3.tokenizer()
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


def test_questions_of_one_picture_do_not_see_each_other() -> None:
    processor = llava.processor()
    torch.manual_seed(0)
    model = llava.build(processor.tokenizer, 2, 2, 32).eval()
    chat, scene = llava.Chat(processor.tokenizer), sampling.sample(3)
    turns = [text.exists(scene, "dog"), text.how_many(scene), text.background(scene)]
    together, alone = chat.batch([turns]), chat.batch([turns[2:]])
    length = alone["input_ids"].shape[1] - len(chat.with_image)
    wanted = processor(
        text="USER: <image>\n{} ASSISTANT: {}</s>".format(*turns[2]), images=scene.image(), return_tensors="pt"
    )
    assert torch.equal(wanted.input_ids, alone["input_ids"])
    assert torch.equal(wanted.pixel_values, llava.pixels([scene]))
    with torch.no_grad():
        together.pop("labels")
        a = model(**together, pixel_values=wanted.pixel_values).logits[0, -length:]
        b = model(**wanted).logits[0, -length:]
    assert torch.allclose(a, b, atol=1e-5)


def test_patch_labels_are_the_categories_on_the_patches() -> None:
    scene = sampling.compose(["dog", "bus"], seed=1)
    labels = llava.patch_labels([scene])[0].reshape(8, 8)
    assert set(labels.unique().tolist()) == {0, llava.NUMBER["dog"], llava.NUMBER["bus"]}
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        assert labels[(top + bottom) // 16, (left + right) // 16] == llava.NUMBER[thing.name]


def test_unknown_model_name_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attnsteer.world.train", "gan"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "choose vae, sd3, llava" in done.stderr

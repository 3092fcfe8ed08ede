"""Use an installed attnsteer: every public name, every processor, and one steered forward of each world that is there.

python check_installed.py SITE_PACKAGES [--without diffusers|transformers]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


class Without:
    """A finder in place of another one that does not find some libraries."""

    def __init__(self, inner: Any, hidden: tuple[str, ...]):
        self.inner, self.hidden = inner, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.hidden else self.inner.find_spec(name, path, target)


def main(site: str, blocked: str | None) -> None:
    if blocked:
        hidden = (blocked, "peft") if blocked == "transformers" else (blocked,)  # peft cannot do without transformers
        sys.meta_path[:] = [Without(finder, hidden) for finder in sys.meta_path]
    import attnsteer

    place = Path(attnsteer.__file__).resolve()
    assert place.is_relative_to(Path(site).resolve()), f"attnsteer came from {place}, not from the wheel"
    assert (place.parent / "py.typed").is_file(), "py.typed is missing"
    assert "torch" not in sys.modules, "importing attnsteer imported torch"
    for name in attnsteer.__all__:
        assert getattr(attnsteer, name) is not None
    from attnsteer import processors

    for name in processors.available():
        assert issubclass(getattr(processors, name), attnsteer.Processor)
        with TemporaryDirectory() as folder:
            configured(processors.get(name)).save_pretrained(folder)
    for library in ("diffusers", "transformers"):
        assert library not in sys.modules, f"importing the public names imported {library}"
    if blocked != "transformers":
        language_model()
    if blocked != "diffusers":
        denoiser()
    print(f"installed attnsteer {attnsteer.__version__} works" + (f" without {blocked}" if blocked else ""))


def configured(processor: Any) -> Any:
    """With its defaults, and what has none: words of the prompt, or masks of one subject."""
    import torch

    if hasattr(processor, "references"):
        return processor(references=torch.ones(1, 8, 8), scene=torch.ones(1, 8, 8))
    if hasattr(processor, "subjects"):
        return processor(subjects=("red dog", "blue car"))
    return processor()


def steers(model: Any, inputs: dict[str, Any]) -> None:
    """Steering changes the output, and leaving brings it back, bit for bit."""
    from dataclasses import dataclass

    import torch

    import attnsteer
    from attnsteer.edits import MeanValue

    @dataclass(frozen=True)
    class Uniform(attnsteer.Processor):
        token_agnostic = True

        def plan(self, site: attnsteer.Site, heads: tuple[int, ...]) -> attnsteer.Mix:
            return attnsteer.Mix(MeanValue(), torch.ones(1, site.heads))

    with torch.no_grad():
        plain = model(**inputs)[0]
        with attnsteer.steer(model, Uniform(attnsteer.Where(layers=0))):
            steered = model(**inputs)[0]
        assert not torch.equal(plain, steered)
        assert torch.equal(plain, model(**inputs)[0])


def denoiser() -> None:
    import torch
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        caption_projection_dim=16, joint_attention_dim=8, pooled_projection_dim=8, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 8)}
    steers(model, {**inputs, "pooled_projections": torch.randn(1, 8), "timestep": torch.ones(1)})


def language_model() -> None:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, image_size=8, patch_size=2, projection_dim=16)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**size, vocab_size=32), image_token_id=5)
    ids = torch.tensor([[1, *[5] * 16, 7, 8]])
    steers(LlavaForConditionalGeneration(config).eval(), {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3] if len(sys.argv) > 3 else None)

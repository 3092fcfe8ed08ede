"""Several pictures in a prompt: every method on every family, a row of two pictures beside a shorter one of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnsteer
from attnsteer import Processor, Where
from attnsteer.hosts.vlm_families import PER_TOKEN
from attnsteer.processors.gift import GIFT
from attnsteer.processors.image_contrast import ImageContrast
from attnsteer.processors.m3id import M3ID
from attnsteer.processors.pai import PAI
from attnsteer.processors.paint import PAINT
from attnsteer.processors.vaf import VAF
from attnsteer.processors.var import VAR
from attnsteer.processors.vcd import VCD
from attnsteer.processors.vhr import VHR
from tests.tiny import vlms

ALL = Where(layers="all")
METHODS: dict[str, Processor] = {
    "VAR": VAR(ALL, tau=1.2, rho=0.1, floor=0.05, channels=(3, 11)),
    "VAF": VAF(ALL, alpha=0.6, beta=0.3),
    "PAI": PAI(ALL),
    "PAINT": PAINT(ALL),
    "VHR": VHR(ALL),
    "GIFT": GIFT(ALL, saliency=1, token_selector="all"),
    "VCD": VCD(),
    "ImageContrast": ImageContrast(gamma=2.0),
    "M3ID": M3ID(decay=0.3),
}
TOKENS = ("input_ids", "attention_mask", *PER_TOKEN)
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
OPTIONS |= {"suppress_tokens": list(range(vlms.VIDEO + 1)), "output_logits": True, "return_dict_in_generate": True}


def of_two_pictures(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Two prompts of one picture each as one prompt."""
    row = {k: torch.cat([v[:1], v[1:, 1:]], 1) if k in TOKENS else v for k, v in given.items()}
    if name == "smolvlm":  # (prompts, tiles of all their pictures, ...)
        row["pixel_values"] = row["pixel_values"].flatten(0, 1)[None]
    return row


def beside(name: str, long: dict[str, Any], short: dict[str, Any]) -> dict[str, Any]:
    """Two prompts as rows, the second padded on the left."""
    missing, rows = long["input_ids"].shape[1] - short["input_ids"].shape[1], {}
    for key, value in short.items():
        if key in TOKENS:
            value = F.pad(value, (missing, 0), value=vlms.PAD if key == "input_ids" else 0)
        elif name == "smolvlm":  # tiles that only fill up
            value = F.pad(value, (0, 0, 0, 0, 0, 0, 0, long[key].shape[1] - value.shape[1]))
        rows[key] = torch.cat([long[key], value])
    return rows


def logits(model: Any, given: dict[str, Any]) -> Tensor:
    return torch.stack(model.generate(**given, **OPTIONS).logits, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", vlms.NAMES)
def test_rows_of_two_and_of_one_picture_are_as_each_alone(name: str) -> None:
    """In double precision, where no token falls on the other side of a cut."""
    model, make = vlms.build(name)
    model.double()
    long, short = of_two_pictures(name, make(2)), make(1, seed=5)
    both = beside(name, long, short)
    long, short, both = (
        {k: v.double() if v.is_floating_point() else v for k, v in given.items()} for given in (long, short, both)
    )
    plain = logits(model, both)
    for method, processor in METHODS.items():
        if method == "PAINT" and name != "llava":  # needs a tower with a class token
            continue
        with attnsteer.steer(model, processor):
            together = logits(model, both)
            for row, given in enumerate((long, short)):
                torch.testing.assert_close(together[row], logits(model, given)[0], rtol=1e-5, atol=1e-5, msg=method)
                assert not torch.allclose(together[row], plain[row], atol=1e-3), method

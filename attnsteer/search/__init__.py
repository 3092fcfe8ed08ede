"""HeadHunter: the search for the attention heads to perturb (arXiv 2506.10978).

pairs = [("a dog and a car", 0), ("a cat and a bus", 1)]
selection = HeadHunter(pipe, PickScore(), pairs, k=3, rounds=5, out="runs/x").run()
pipe.set_attn_processor(SoftPAG(selection.where(top=9), strength=0.5))
"""

from __future__ import annotations

from .headhunter import HeadHunter
from .hunter import Round, generations, hunt
from .objectives import HPS, Aesthetic, Clip, Colourfulness, Harmonic, Objective, PickScore, Thresholded, WorldJudge
from .selection import Head, Selection

__all__ = [
    "HPS",
    "Aesthetic",
    "Clip",
    "Colourfulness",
    "Harmonic",
    "Head",
    "HeadHunter",
    "Objective",
    "PickScore",
    "Round",
    "Selection",
    "Thresholded",
    "WorldJudge",
    "generations",
    "hunt",
]

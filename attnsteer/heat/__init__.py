"""Heat maps: where a picture is looked at for a word of its prompt, or of an answer about it.

``heat_maps`` reads diffusion pipelines, ``answer_maps`` vision-language models; both give ``HeatMaps``.
"""

from .answers import AnswerMaps, answer_maps
from .result import HeatMaps
from .words import heat_maps

__all__ = ["AnswerMaps", "HeatMaps", "answer_maps", "heat_maps"]

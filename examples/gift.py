"""GIFT: the picture is looked at again where the gaze went while the question was read (arXiv 2510.22067).

python examples/gift.py
python examples/gift.py --num-scenes 50 --alpha 3
python examples/gift.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --device cuda
"""

from __future__ import annotations

from asking import compare, options

from attnsteer.processors import GIFT


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--alpha", type=float, default=None, help="strength (default: the paper's for the model)")
    given = parser.parse_args(arguments)
    compare(given, lambda: {"GIFT": [GIFT(alpha=given.alpha)]})


if __name__ == "__main__":
    main()

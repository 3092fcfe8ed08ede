"""VHR: the heads are strengthened that look at the image (arXiv 2412.13949).

python examples/vhr.py
python examples/vhr.py --num-scenes 50 --alpha 3
python examples/vhr.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --device cuda
"""

from __future__ import annotations

from asking import compare, options

from attnsteer.processors import VHR


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--alpha", type=float, default=2.0, help="factor on their outputs")
    given = parser.parse_args(arguments)
    compare(given, lambda: {"VHR": [VHR(alpha=given.alpha)]})


if __name__ == "__main__":
    main()

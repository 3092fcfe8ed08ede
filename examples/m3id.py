"""M3ID: the longer the answer, the more it is kept from what the model would say without picture (arXiv 2403.14003).

python examples/m3id.py
python examples/m3id.py --num-scenes 50
python examples/m3id.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --device cuda
"""

from __future__ import annotations

from asking import compare, options

from attnsteer.processors import M3ID


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--decay", type=float, default=0.02, help="how fast the picture is forgotten")
    given = parser.parse_args(arguments)
    compare(given, lambda: {"M3ID": [M3ID(decay=given.decay)]})


if __name__ == "__main__":
    main()

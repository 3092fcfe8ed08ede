"""PAINT: image logits are raised where the vision tower finds informative patches (arXiv 2501.12206).

The paper's alpha of 0.7 makes texts repeat themselves.

python examples/paint.py
python examples/paint.py --num-scenes 50
python examples/paint.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --device cuda
"""

from __future__ import annotations

from asking import compare, options

from attnsteer.processors import PAINT


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--alpha", type=float, default=0.5, help="at patches of local interest")
    parser.add_argument("--beta", type=float, default=0.3, help="at patches that sum up the picture")
    given = parser.parse_args(arguments)
    compare(given, lambda: {"PAINT": [PAINT(alpha=given.alpha, beta=given.beta)]})


if __name__ == "__main__":
    main()

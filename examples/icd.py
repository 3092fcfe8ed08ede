"""ICD: words that a disturbing instruction suggests too weigh less (arXiv 2403.18715).

python examples/icd.py
python examples/icd.py --num-scenes 50
python examples/icd.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --device cuda
"""

from __future__ import annotations

from asking import compare, options

from attnsteer.processors import ICD


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--alpha", type=float, default=1.0, help="strength of the contrast")
    given = parser.parse_args(arguments)
    compare(given, lambda: {"ICD": [ICD(alpha=given.alpha)]})


if __name__ == "__main__":
    main()

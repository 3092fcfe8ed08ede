"""VCD: words that a noised picture suggests too weigh less (arXiv 2311.16922).

python examples/vcd.py
python examples/vcd.py --num-scenes 50
python examples/vcd.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --device cuda
"""

from __future__ import annotations

from asking import compare, options

from attnsteer.processors import VCD


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--alpha", type=float, default=1.0, help="strength of the contrast")
    parser.add_argument("--noise-step", type=int, default=500, help="0 to 999")
    given = parser.parse_args(arguments)
    compare(given, lambda: {"VCD": [VCD(alpha=given.alpha, noise_step=given.noise_step)]})


if __name__ == "__main__":
    main()

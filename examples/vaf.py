"""VAF (ClearSight): image logits up, system prompt down, for all queries behind the image (arXiv 2503.13107).

python examples/vaf.py
python examples/vaf.py --num-scenes 50 --alpha 0.3
python examples/vaf.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --device cuda
"""

from __future__ import annotations

from asking import compare, options

from attnsteer.processors import VAF


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--alpha", type=float, default=0.15, help="image logits are multiplied by 1 + alpha")
    parser.add_argument("--beta", type=float, default=0.05, help="system logits are multiplied by 1 - beta")
    given = parser.parse_args(arguments)
    compare(given, lambda: {"VAF": [VAF(alpha=given.alpha, beta=given.beta)]})


if __name__ == "__main__":
    main()

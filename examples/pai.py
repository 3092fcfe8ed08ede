"""PAI: image logits of the row that predicts are raised, and words that need no picture weigh less (arXiv 2407.21771).

python examples/pai.py
python examples/pai.py --num-scenes 50
python examples/pai.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --device cuda
"""

from __future__ import annotations

from asking import compare, options

from attnsteer.processors import PAI, ImageContrast


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--alpha", type=float, default=0.5, help="of the attention logits")
    parser.add_argument("--gamma", type=float, default=1.1, help="of the contrast without picture; 1 is none")
    given = parser.parse_args(arguments)
    compare(
        given,
        lambda: {
            "attention": [PAI(alpha=given.alpha)],
            "contrast": [ImageContrast(gamma=given.gamma)],
            "PAI": [PAI(alpha=given.alpha), ImageContrast(gamma=given.gamma)],
        },
    )


if __name__ == "__main__":
    main()

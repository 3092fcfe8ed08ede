"""VAR: attention moves from sinks to the rest of the image (arXiv 2503.03321).

world-llava has no sinks (no channel reaches 6 times the RMS), so that nothing changes there, and VAR says so.

python examples/var.py
python examples/var.py --num-scenes 50
python examples/var.py --model llava-hf/llava-1.5-7b-hf --images *.jpg --device cuda
"""

from __future__ import annotations

from asking import compare, options

from attnsteer.processors import VAR


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--fraction", type=float, default=0.6, help="share of the sinks' attention that moves")
    parser.add_argument("--tau", type=float, default=20.0, help="from how many times the RMS on a channel makes a sink")
    parser.add_argument("--rho", type=float, default=0.5, help="least share of a head's image attention beside sinks")
    given = parser.parse_args(arguments)
    compare(given, lambda: {"VAR": [VAR(fraction=given.fraction, tau=given.tau, rho=given.rho)]})


if __name__ == "__main__":
    main()

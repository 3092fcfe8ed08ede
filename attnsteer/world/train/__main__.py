"""`python -m attnsteer.world.train NAME ...`: train one of the world's models."""

from __future__ import annotations

import importlib
import sys

NAMES = ("vae", "sd", "sd3", "flux", "llava", "judge")
USAGE = f"""usage: python -m attnsteer.world.train {{{",".join(NAMES)}}} [options]

  python -m attnsteer.world.train vae --help
  python -m attnsteer.world.train vae   --steps 3000 --threads 2
  python -m attnsteer.world.train sd3   --threads 2 --compile --resume
  python -m attnsteer.world.train llava --device cuda
"""


def main() -> int:
    """Hand the arguments to the script of that name."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        return 0
    if sys.argv[1] not in NAMES:
        print(f"There is no model {sys.argv[1]!r} to train; choose {', '.join(NAMES)}.\n{USAGE}", file=sys.stderr)
        return 2
    importlib.import_module(f"attnsteer.world.train.{sys.argv[1]}").main(sys.argv[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())

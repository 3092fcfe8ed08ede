"""``python -m attnsteer`` is the command ``attnsteer``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

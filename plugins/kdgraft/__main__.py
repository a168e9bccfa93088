"""``python -m kdgraft``, and ``accelerate launch -m kdgraft`` for several processes."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

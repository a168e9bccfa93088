"""``python -m taskdistill``, and ``accelerate launch -m taskdistill`` for several processes."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

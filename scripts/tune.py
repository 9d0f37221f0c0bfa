"""Search settings on validation: python scripts/tune.py --help."""

import sys

from m2rec.commands.tune import main

if __name__ == "__main__":
    sys.exit(main())

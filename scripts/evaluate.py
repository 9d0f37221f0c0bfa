"""Score a trained run on other data: python scripts/evaluate.py --help."""

import sys

from m2rec.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())

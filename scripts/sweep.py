"""Run a sweep: python scripts/sweep.py --help."""

import sys

from m2rec.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main())

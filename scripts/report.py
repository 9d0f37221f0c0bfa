"""Rebuild the result tables and the plots from results/: python scripts/report.py --help."""

import sys

from m2rec.commands.report import main

if __name__ == "__main__":
    sys.exit(main())

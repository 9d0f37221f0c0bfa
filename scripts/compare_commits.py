"""Check that a change of the code changes no digit: python scripts/compare_commits.py --help."""

import sys

from m2rec.commands.compare_commits import main

if __name__ == "__main__":
    sys.exit(main())

"""Recommend items by a trained run: python scripts/recommend.py --help."""

import sys

from m2rec.commands.recommend import main

if __name__ == "__main__":
    sys.exit(main())

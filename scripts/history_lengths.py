"""Whether a longer history helps than those in training: python scripts/history_lengths.py --help."""

import sys

from m2rec.commands.history_lengths import main

if __name__ == "__main__":
    sys.exit(main())

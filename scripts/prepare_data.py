"""Raw data to RecBole's files: python scripts/prepare_data.py --help."""

import sys

from m2rec.commands.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())

"""Make a text-vector file: python scripts/embed_items.py --help."""

import sys

from m2rec.commands.embed_items import main

if __name__ == "__main__":
    sys.exit(main())

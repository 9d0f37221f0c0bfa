"""How well items are ranked that training has never met: python scripts/new_items.py --help."""

import sys

from m2rec.commands.new_items import main

if __name__ == "__main__":
    sys.exit(main())

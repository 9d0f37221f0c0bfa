"""Write docs/settings.md from m2rec/settings.py and config.yaml: python scripts/document.py --help."""

import sys

from m2rec.commands.document import main

if __name__ == "__main__":
    sys.exit(main())

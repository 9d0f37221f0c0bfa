"""Push a trained run to the Hugging Face hub: python scripts/push.py --help."""

import sys

from m2rec.commands.push import main

if __name__ == "__main__":
    sys.exit(main())

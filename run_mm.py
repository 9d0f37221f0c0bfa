"""Train and evaluate M2Rec or a baseline: python run_mm.py [--key=value ...]; --help says more."""

import sys

from m2rec.commands.run import main

if __name__ == "__main__":
    sys.exit(main())

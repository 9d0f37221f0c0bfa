"""Serve a trained run over HTTP: python scripts/serve.py --help."""

import sys

from m2rec.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())

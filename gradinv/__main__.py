"""`python -m gradinv` is the command `gradinv`."""

from __future__ import annotations

import sys

from gradinv.cli import main

if __name__ == "__main__":
    sys.exit(main())

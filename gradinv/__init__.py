"""gradinv: turn the gradients that federated learning shares back into the images behind them."""

from __future__ import annotations

import os

# Read when torch is loaded, so before that. Threads that wait for each other would otherwise spin, which can make a run
# ten times as slow as soon as another process wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
__all__ = ["__version__"]

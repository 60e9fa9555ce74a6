"""gradinv: turn the gradients that federated learning shares back into the images behind them."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]

"""What a gradient says without a search: labels, features, and the layers below them, in closed form."""

from gradinv.recovery.recover import recover

__all__ = ["recover"]

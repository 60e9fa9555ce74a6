"""The error of bad use. It stands apart from `gradinv.types`, since torch takes seconds to import."""

from __future__ import annotations


class GradinvError(ValueError):
    """Something the user can mend. Its text is one sentence that says what is wrong and what to do."""

"""The signature of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, name of the current step). May raise an exception to cancel the work."""

"""Whether a package is installed, without importing it. Commands, checks and models that need an extra ask."""

from __future__ import annotations

import importlib.util


def is_installed(module: str) -> bool:
    """Whether `module` can be imported, by its dotted name. Only the packages above it are imported. Raises nothing."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False

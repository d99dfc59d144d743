"""The one door through which optional packages are imported.

`import lorakit` must stay instant and the core must run with torch alone, so everything heavier is imported
inside the function that needs it, and a missing package names the extra that brings it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from lorakit.errors import MissingExtraError


def need(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise `MissingExtraError` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or not module.startswith(missing.name):
            raise
        raise MissingExtraError(
            f"this needs the package '{missing.name}', which is not installed; run: pip install 'lorakit[{extra}]'"
        ) from missing

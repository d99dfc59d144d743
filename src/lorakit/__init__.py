"""lorakit: make a pretrained model yours with a low-rank update.

The shop window. Every name is resolved on first use, so that importing the package stays instant and the command line
answers before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.core.spec import AdapterSpec, Override, Targets
    from lorakit.core.state import AdapterState, trim
    from lorakit.errors import LorakitError
    from lorakit.inject.activate import active, use
    from lorakit.inject.alive import alive
    from lorakit.inject.attach import Handle, attach, detach, state
    from lorakit.inject.evidence import gather
    from lorakit.inject.fuse import fuse, unfuse
    from lorakit.inject.merge import merge
    from lorakit.inject.penalty import penalty
    from lorakit.inject.sites import sites
    from lorakit.methods.lora import LoRA
    from lorakit.persist import load, save
    from lorakit.spectral.inspection import inspect
    from lorakit.spectral.spectrum import spectrum
    from lorakit.training.groups import param_groups
    from lorakit.training.plan import plan
    from lorakit.training.planned import PlannedRun
    from lorakit.training.recipe import Recipe, load_recipe
    from lorakit.training.run import Run, train

__version__ = "0.1.0"

_WINDOW = {
    "AdapterSpec": "lorakit.core.spec",
    "AdapterState": "lorakit.core.state",
    "Handle": "lorakit.inject.attach",
    "LoRA": "lorakit.methods.lora",
    "LorakitError": "lorakit.errors",
    "Override": "lorakit.core.spec",
    "PlannedRun": "lorakit.training.planned",
    "Recipe": "lorakit.training.recipe",
    "Run": "lorakit.training.run",
    "Targets": "lorakit.core.spec",
    "active": "lorakit.inject.activate",
    "alive": "lorakit.inject.alive",
    "attach": "lorakit.inject.attach",
    "detach": "lorakit.inject.attach",
    "fuse": "lorakit.inject.fuse",
    "gather": "lorakit.inject.evidence",
    "inspect": "lorakit.spectral.inspection",
    "load": "lorakit.persist",
    "load_recipe": "lorakit.training.recipe",
    "merge": "lorakit.inject.merge",
    "param_groups": "lorakit.training.groups",
    "penalty": "lorakit.inject.penalty",
    "plan": "lorakit.training.plan",
    "save": "lorakit.persist",
    "sites": "lorakit.inject.sites",
    "spectrum": "lorakit.spectral.spectrum",
    "state": "lorakit.inject.attach",
    "train": "lorakit.training.run",
    "trim": "lorakit.core.state",
    "unfuse": "lorakit.inject.fuse",
    "use": "lorakit.inject.activate",
}

__all__ = [
    "AdapterSpec",
    "AdapterState",
    "Handle",
    "LoRA",
    "LorakitError",
    "Override",
    "PlannedRun",
    "Recipe",
    "Run",
    "Targets",
    "active",
    "alive",
    "attach",
    "detach",
    "fuse",
    "gather",
    "inspect",
    "load",
    "load_recipe",
    "merge",
    "param_groups",
    "penalty",
    "plan",
    "save",
    "sites",
    "spectrum",
    "state",
    "train",
    "trim",
    "unfuse",
    "use",
]


def __getattr__(name: str) -> Any:
    """Import a name of the window on first use."""
    if name not in _WINDOW:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_WINDOW[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return exactly the window."""
    return [*__all__, "__version__"]

"""Check jaxtyping annotations with beartype while tests run, and step aside while torch.compile or torch.export trace.

jaxtyping's import hook wraps every function of the named modules. Its wrapper inspects signatures, which dynamo
cannot trace, so a compiled test would fail for a reason production does not have. The gate around it calls the
plain function then: the compiled code is exactly what runs without the checks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

whole_numbers_are_floats = beartype(conf=BeartypeConf(is_pep484_tower=True))  # as mypy has it: `alpha: 32`


def check_shapes(*modules: str) -> None:
    """Install the checks for these modules and those below them; none may have been imported before."""
    early = [name for name in sys.modules if name in modules or name.startswith(tuple(f"{m}." for m in modules))]
    assert not early, f"imported before the shape checks were installed: {early}"
    jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = _gated(jaxtyping.jaxtyped)
    jaxtyping.install_import_hook(modules, "tests.shape_checks.whole_numbers_are_floats")


def _gated(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(jaxtyped)
    def decorate(fn: Any = None, *, typechecker: Any = None) -> Any:
        if fn is None:
            return functools.partial(decorate, typechecker=typechecker)
        checked = jaxtyped(fn, typechecker=typechecker)
        if not isinstance(checked, FunctionType):
            return checked  # a class, property, classmethod: jaxtyping comes back here for the function inside

        @functools.wraps(fn)
        def gate(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return fn(*args, **kwargs)
            return checked(*args, **kwargs)

        return gate

    return decorate

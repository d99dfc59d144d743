"""Adapters on disk: `save` and `load`, in PEFT's format or lorakit's own, and from the original loralib's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorakit.errors import AdapterFileError, did_you_mean, few, looked_in

if TYPE_CHECKING:
    import torch

    from lorakit.core.state import AdapterState

__all__ = ["LORALIB", "kept_in_8_bits", "load", "peft_refusal", "save"]

LORALIB = (".bin", ".pt", ".pth", ".ckpt")
"""Names of files that are read as the original loralib's."""
_ADAPTERS = ("adapter_model.safetensors", "adapter.lorakit.safetensors")


def save(
    state: AdapterState,
    path: str | Path,
    format: Literal["peft", "native"] = "peft",
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter to a directory in one step: the old content or the new, never half of one.

    Args:
        state: the adapter, from `state(model)` or an analysis.
        path: the directory; other files in it stay.
        format: "peft" for methods other tools read too, "native" for any method, bit for bit.
        dtype: what the tensors of its updates are written in, where it holds them exactly: those that `compress` made
            8 bits of. As they are if None.

    Raises:
        AdapterFileError: a method or format that cannot be written, a dtype that would change a value, or a failed
            write (the old adapter is intact).
    """
    from lorakit.core.state import expect_adapter

    expect_adapter(state)
    if format == "peft":
        from lorakit.persist.peft import save_peft

        save_peft(state, path, dtype)
    elif format == "native":
        from lorakit.persist.native import save_native

        save_native(state, path, dtype)
    else:
        raise AdapterFileError(f"unknown format {format!r}{did_you_mean(format, ('peft', 'native'))}; peft or native")


def peft_refusal(state: AdapterState) -> str | None:
    """Return why an adapter cannot be written in PEFT's format, or None where it can."""
    from lorakit.persist.peft import to_peft

    try:
        to_peft(state)
    except AdapterFileError as why:
        return str(why)
    return None


def kept_in_8_bits(path: str | Path) -> Literal["int8", "fp8"] | None:
    """Return which numbers of 8 bits an adapter is kept in on disk, if in any; `load` widens them."""
    from lorakit.persist.files import stored_as

    place = Path(path)
    files = [place] if place.is_file() else [f for f in place.rglob("adapter*.safetensors") if f.name in _ADAPTERS]
    dtypes = stored_as(files[0]) if len(files) == 1 and files[0].suffix == ".safetensors" else set()
    return "int8" if "I8" in dtypes else "fp8" if "F8_E4M3" in dtypes else None


def load(
    path: str | Path, *, alpha: float | None = None, enabled: Sequence[bool] | None = None, checked: bool = False
) -> AdapterState:
    """Return the adapter at `path`, whichever format it has.

    Args:
        path: a directory, or the file of a native or loralib adapter.
        alpha: of a loralib file, which does not store it.
        enabled: which projections the merged layers of a loralib file adapt, as its `enable_lora` had it.
        checked: the files were held against their checksums just now, as a store does it, and need not be again.

    Raises:
        AdapterFileError: nothing there, something else there, or an adapter with faults (all of them listed).
    """
    from lorakit.persist import native, peft
    from lorakit.persist.files import resting
    from lorakit.persist.loralib import load_loralib

    place = resting(path)
    if not place.exists():
        raise AdapterFileError(f"{path} does not exist{_near(Path(path))}{looked_in(Path(path))}")
    if place.is_file():
        if place.name == native.NATIVE:
            if given := _given(alpha, enabled):
                raise AdapterFileError(f"{path} stores its alpha and its layers; leave {given} out")
            return native.load_native(place)
        if place.suffix in LORALIB:
            return load_loralib(place, alpha=alpha, enabled=enabled)
        if place.name in (peft.CONFIG, peft.WEIGHTS, peft.NOTE):
            raise AdapterFileError(f"{path} is one file of an adapter; give its folder, {place.parent}")
        raise AdapterFileError(f"{path} is a file; give the adapter's directory, or a loralib .bin or .pt file")
    has_native = (place / native.NATIVE).exists()
    has_peft = (place / peft.CONFIG).exists() or any(place.glob(f"*/{peft.CONFIG}"))
    if has_native and (place / peft.CONFIG).exists():
        raise AdapterFileError(f"{path} holds two adapters, {native.NATIVE} and {peft.CONFIG}; move one away")
    if (has_native or has_peft) and (given := _given(alpha, enabled)):
        raise AdapterFileError(
            f"{path} stores its alpha and its layers; leave {given} out, it is for the original loralib's files"
        )
    if has_native:
        return native.load_native(place)
    if has_peft:
        return peft.load_peft(place, checked=checked)
    raise AdapterFileError(f"{path} is no adapter: {_found(place)}")


def _given(alpha: float | None, enabled: Sequence[bool] | None) -> str:
    return " and ".join(name for name, value in (("--alpha", alpha), ("--enabled", enabled)) if value is not None)


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; nor does {path.parent}"
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir() if not p.name.startswith(".")])


def _found(place: Path) -> str:
    """Return what a directory without an adapter holds, in the user's words."""
    names = sorted(p.name for p in place.iterdir())
    weights = [n for n in names if n.startswith(("model", "pytorch_model")) and n.endswith((".safetensors", ".bin"))]
    if "config.json" in names and weights:
        return "it holds a full model; give it as the base, and the adapter's directory here"
    if pickles := [n for n in names if n.endswith((".bin", ".pt", ".pth"))]:
        return f"it holds {pickles[0]}; if that is a loralib adapter, give the file itself and its alpha"
    if not names:
        return "it is empty"
    return f"expected adapter_config.json or adapter.lorakit.safetensors, found {few(names, 6)}"

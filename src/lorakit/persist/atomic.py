"""Files that are whole or absent: a directory is filled beside its place and put there in one step.

An adapter is several files that only mean something together, so the unit written is the directory: filled beside its
place, synced, and exchanged with the old one in a single rename. A crash at any byte leaves the old adapter or the new
one. What a crash leaves behind has a telling name, is never read, and goes with the next save.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lorakit.errors import AdapterFileError

NEW, OLD = ".lorakit-new-", ".lorakit-old-"
_UNCHANGED = "what was there before is untouched"


@contextmanager
def atomic_directory(path: str | Path, *, clean: bool = False, drop: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to fill; on success it becomes `path` in one step, on failure it goes.

    Files of an existing `path` that the new one does not have are carried over, unless `clean`, or named in `drop`.

    Raises:
        AdapterFileError: the disk is full, the place is not writable or not a directory; the old content is intact.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_dir():
        raise AdapterFileError(f"{path} is a file; give a directory to save into")
    draft: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(place)
        draft = place.with_name(f".{place.name}{NEW}{secrets.token_hex(4)}")
        draft.mkdir()
        with locked(draft):
            yield draft
            if place.is_dir():
                _carry_over(place, draft, clean, drop)
            _publish(draft, place)
    except OSError as failed:
        where = f" while writing {Path(failed.filename).name}" if failed.filename and draft is not None else ""
        raise AdapterFileError(f"{path}: could not save{where}: {failed.strerror or failed}; {_UNCHANGED}") from failed
    except (AdapterFileError, SafetensorError) as failed:
        raise AdapterFileError(f"{path}: {failed}; {_UNCHANGED}") from failed.__cause__
    finally:
        if draft is not None:  # after success, what lies here is the old content
            shutil.rmtree(draft, ignore_errors=True)


def write_file(file: Path, data: bytes | str) -> None:
    """Write `data` to a new file.

    Raises:
        AdapterFileError: the write failed; says how many bytes it needed and how many are free.
    """
    raw = data.encode() if isinstance(data, str) else data
    write_pieces(file, [memoryview(raw)], len(raw))


def write_pieces(file: Path, pieces: Iterable[memoryview], size: int) -> None:
    """Write pieces of bytes, `size` in all, one after another to a new file.

    Raises:
        AdapterFileError: the write failed; says how many bytes it needed and how many are free.
    """
    with _told(file, size):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for piece in pieces:
            with _told(file, size):
                done = 0
                while done < len(piece):
                    done += os.write(handle, piece[done : done + (1 << 24)])
            del piece  # it may be large, and the next one is made before the loop would let go of it
    finally:
        os.close(handle)


@contextmanager
def _told(file: Path, size: int) -> Iterator[None]:
    """Say of a write that failed how many bytes it needed and how many are free."""
    try:
        yield
    except OSError as failed:
        free = shutil.disk_usage(file.parent).free
        needs = f"it needs {size:,} bytes, {free:,} are free"
        raise AdapterFileError(f"could not write {file.name}: {failed.strerror or failed} ({needs})") from failed


def resting(path: str | Path) -> Path:
    """Return where the content of `path` lies: itself, or its backup when a two-step replacement was cut in between."""
    place = Path(path)
    if not place.exists():
        for backup in sorted(place.parent.glob(f".{_literal(place.name)}{OLD}*")):
            return backup
    return place


def _carry_over(place: Path, draft: Path, clean: bool, drop: frozenset[str]) -> None:
    """Bring what the new version does not have: files by hard link, so that it costs neither bytes nor time."""
    shutil.copymode(place, draft)
    if clean:
        return
    for entry in place.iterdir():
        target = draft / entry.name
        if entry.name in drop or target.exists() or target.is_symlink():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link_or_copy)
        elif entry.is_symlink():
            os.symlink(os.readlink(entry), target)
        else:
            _link_or_copy(str(entry), str(target))


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError as failed:
        if failed.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        shutil.copy2(source, target)
    return target


def _publish(draft: Path, place: Path) -> None:
    """Sync the draft and put it in the old version's place; whatever fails leaves the old version there."""
    usual = _usual_mode(draft)
    for folder, _, files in os.walk(draft):
        for name in files:
            file = Path(folder, name)
            if stat.S_IMODE(file.stat().st_mode) == stat.S_IRUSR | stat.S_IWUSR:  # as safetensors makes its files
                file.chmod(usual)
            _sync(file)
        _sync(Path(folder))
    existed = place.exists()
    put = _swap if existed else os.rename
    put(draft, place)
    try:
        _sync(place.parent)
    except OSError:
        put(*((draft, place) if existed else (place, draft)))
        raise


def _usual_mode(folder: Path) -> int:
    """Return the mode the user's umask gives a new file."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _swap(draft: Path, place: Path) -> None:
    """Exchange two directories in one step, or in renames where the system cannot; a second call undoes the first."""
    if _exchange(draft, place):
        return
    backup = place.with_name(f".{place.name}{OLD}{secrets.token_hex(4)}")
    os.rename(place, backup)
    try:
        os.rename(draft, place)
    except OSError:
        os.rename(backup, place)
        raise
    with suppress(OSError):  # else it lies there as a leftover, which the next save clears
        os.rename(backup, draft)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories atomically (Linux renameat2); return False where the system or the disk cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as failed:
        failed.filename = str(path)
        raise
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder while its writer lives: the system frees it with the process, however that ends.

    False is that another holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks here: leftovers count as abandoned
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as taken:
        return taken.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _clear_leftovers(place: Path) -> None:
    """Finish or remove what a killed save left beside `place`; drafts of living writers are locked and stay."""
    backup = resting(place)
    if backup != place:
        os.rename(backup, place)
    name = _literal(place.name)
    for leftover in (*place.parent.glob(f".{name}{NEW}*"), *place.parent.glob(f".{name}{OLD}*")):
        with suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY)
            try:
                if _lock(handle):
                    shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(handle)


def _literal(name: str) -> str:
    """Return a name with glob's special characters quoted."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)

"""A store keeps an adapter by its content, once, unchanged, or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit import load
from lorakit.errors import AdapterFileError, UnknownAdapterError
from lorakit.serving.shelf import store as module
from lorakit.serving.shelf.arrival import describe
from lorakit.serving.shelf.manifest import File, Golden, read_manifest
from lorakit.serving.shelf.store import Store
from tests.serving.adapters import folder_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def contents(root: Path) -> dict[str, bytes]:
    """Return all files under a folder that is not the lock."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def edit(place: Path, text: str) -> None:
    """Change a file of the store by force."""
    place.chmod(0o644)
    place.write_text(text)


@pytest.mark.parametrize("format", ["peft", "native"])
def test_what_is_stored_loads_and_says_what_it_is(store: Store, tmp_path: Path, format: Any) -> None:
    manifest = store.add(folder_of(tmp_path / "a", 1.0, rank=3, format=format))
    place = store.get(manifest.digest)
    assert place == store.root / "adapters" / manifest.digest
    assert load(place).updates[0].tensors["down"].eq(1).all()
    assert read_manifest(place) == manifest == store.verify(manifest.digest) == store.manifests()[0]
    assert (manifest.method, manifest.rank, manifest.parameters) == ("lora", 3, 24)
    assert manifest.base.name == "some/base"
    assert manifest.purpose is not None
    assert all(file.stat().st_mode & 0o222 == 0 for file in place.iterdir())
    assert Store(store.root).get(manifest.digest[:8]) == place


def test_the_digest_follows_config_and_tensors_and_nothing_else(store: Store, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", 1.0)
    digest = store.add(folder).digest
    (folder / "README.md").write_text("mine")
    (folder / "tokenizer.json").write_text("{}")
    os.utime(folder / "adapter_model.safetensors", (0, 0))
    moved = folder.rename(tmp_path / "b")
    assert store.add(moved).digest == digest
    summed = "sha256sum adapter_config.json adapter_model.safetensors lorakit.json | sha256sum | cut -c1-64"
    assert subprocess.check_output(summed, shell=True, cwd=moved, text=True).strip() == digest
    assert store.add(folder_of(tmp_path / "c", 2.0)).digest != digest
    assert store.add(folder_of(tmp_path / "d", 1.0, rank=3)).digest != digest
    (moved / "lorakit.json").unlink()
    other = json.loads((moved / "adapter_config.json").read_text()) | {"lora_alpha": 5}
    (moved / "adapter_config.json").write_text(json.dumps(other))
    assert store.add(moved).digest != digest
    assert len(store.manifests()) == 4


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=5))
def test_adding_again_changes_nothing(tmp_path: Path, values: list[float]) -> None:
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    store = Store(tmp_path / "store")
    for value in values:
        if not (tmp_path / str(value)).exists():
            folder_of(tmp_path / str(value), value)
    first = {value: store.add(tmp_path / str(value)) for value in values}
    before = contents(store.root)
    assert {value: store.add(tmp_path / str(value)) for value in values} == first
    assert contents(store.root) == before
    assert len(store.manifests()) == len(set(values))


def test_what_could_hold_code_or_lead_out_is_refused_all_at_once(store: Store, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    torch.save({}, folder / "training_args.bin")
    (folder / "model.py").write_text("raise SystemExit")
    (folder / "new\nline.json").write_text("{}")
    (folder / "checkpoint-1").mkdir()
    (tmp_path / "secret.json").write_text("{}")
    (folder / "key.json").symlink_to(tmp_path / "secret.json")
    (folder / "lost.json").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(AdapterFileError) as refused:
        store.add(folder)
    for line in (
        "'training_args.bin': a pickle, which can hold code",
        "'model.py': of no kind an adapter has",
        r"'new\nline.json': an odd name",
        "'checkpoint-1': a folder; give the adapter's folder alone",
        f"'key.json': a link out of the folder, to {tmp_path / 'secret.json'}; copy the folder with `cp -rL`",
        "'lost.json': a link to nothing",
        "'pipe.json': not a file",
    ):
        assert line in str(refused.value)
    assert contents(store.root) == {}


def test_a_pickle_behind_a_link_or_as_the_weights_is_refused(store: Store, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").symlink_to("adapter_model.bin")
    with pytest.raises(
        AdapterFileError, match=r"'adapter_model\.bin': a pickle(.|\n)*'adapter_model\.safetensors': a pic"
    ):
        store.add(folder)


def test_a_link_inside_the_folder_and_hidden_files_are_taken(store: Store, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    (folder / "lorakit.json").rename(folder / "note.json")
    (folder / "lorakit.json").symlink_to("note.json")
    (folder / ".git").mkdir()
    place = store.get(store.add(folder).digest)
    assert sorted(p.name for p in place.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "lorakit.json", "manifest.json"
    ]  # fmt: skip
    assert not any(p.is_symlink() for p in place.iterdir())


def test_what_is_no_adapter_or_too_large_is_told(store: Store, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="none does not exist"):
        store.add(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="is no adapter: it is empty"):
        store.add(tmp_path / "empty")
    with pytest.raises(AdapterFileError, match=r"holds [\d,]+ bytes, and at most 100 are taken"):
        store.add(folder_of(tmp_path / "a"), most_bytes=100)
    (tmp_path / "deep").mkdir()
    folder_of(tmp_path / "deep" / "inner")
    with pytest.raises(AdapterFileError, match="'inner': a folder with an adapter; give that folder"):
        store.add(tmp_path / "deep")


class FullDiskAt:
    """The n-th call of a function of the system fails with ENOSPC; the others go through."""

    def __init__(self, step: str, n: int) -> None:
        self.real, self.left = getattr(os, step), n

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("step", ["write", "fsync", "rename", "mkdir", "open"])
def test_a_full_disk_leaves_nothing_behind(
    step: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said, full = folder_of(tmp_path / "a"), list[str](), FullDiskAt(step, 0)
    for n in range(60):
        full, done = FullDiskAt(step, n), ""
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            try:
                done = store.add(folder).digest
            except AdapterFileError as problem:
                said.append(str(problem))
        if done:  # nothing failed, or what did not matter: making a folder that is there
            store.remove(store.verify(done).digest)
        assert sorted(p.name for p in store.root.rglob("*")) == [".lock", "adapters"]
        if full.left >= 0:
            break
    assert full.left >= 0
    assert said
    assert all("No space left on device" in message for message in said)


def test_a_killed_writer_is_swept_and_a_living_one_is_not(store: Store, tmp_path: Path) -> None:
    folder_of(tmp_path / "a")
    code = f"""
import os, signal, sys, time
from pathlib import Path
from lorakit.serving.shelf import store
def stops(*_):
    print("half", flush=True)
    time.sleep(60)
store.write_file = stops
store.Store(Path({str(store.root)!r})).add(Path({str(tmp_path / "a")!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        half = [p.name for p in (store.root / "adapters").iterdir()]
        assert len(half) == 1
        assert Store(store.root).manifests() == []
        assert [p.name for p in (store.root / "adapters").iterdir()] == half
        writer.kill()
    Store(store.root)
    assert list((store.root / "adapters").iterdir()) == []


def test_threads_and_processes_may_add_one_adapter_at_once(store: Store, tmp_path: Path) -> None:
    folder_of(tmp_path / "a")
    code = f"""
import sys
from pathlib import Path
from lorakit.serving.shelf.store import Store
store = Store(Path({str(store.root)!r}))
print("ready", flush=True)
sys.stdin.readline()
print(store.add(Path({str(tmp_path / "a")!r})).digest)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        with ThreadPoolExecutor(8) as threads:
            mine = list(threads.map(lambda _: store.add(tmp_path / "a"), range(16)))
        theirs = other.stdout.read().strip()
    assert {m.digest for m in mine} == {theirs} == {store.manifests()[0].digest}
    assert store.verify(theirs) == mine[0]


def test_a_change_in_the_store_is_found(store: Store, tmp_path: Path) -> None:
    digest = store.add(folder_of(tmp_path / "a")).digest
    place = store.get(digest)
    was = (place / "adapter_config.json").read_text()
    edit(place / "adapter_config.json", was + " ")
    expected = store.manifests()[0].files["adapter_config.json"].sha256
    with pytest.raises(
        AdapterFileError, match=rf"adapter_config\.json: expected sha256 {expected}, found [0-9a-f]{{64}}"
    ):
        store.verify(digest)
    manifest = json.loads((place / "manifest.json").read_text())
    edit(place / "manifest.json", json.dumps(manifest | {"digest": "0" * 64}))
    with pytest.raises(AdapterFileError, match=rf"manifest\.json: digest, expected {digest}, found 0000"):
        store.verify(digest)
    manifest["files"]["adapter_config.json"] = {"sha256": "0" * 64, "bytes": 1}
    edit(place / "manifest.json", json.dumps(manifest))
    with pytest.raises(
        AdapterFileError, match=rf"manifest\.json: its files and template make the digest, expected {digest}, found"
    ):
        store.verify(digest)
    (place / "adapter_model.safetensors").unlink()
    (place / "adapter.lorakit.safetensors").write_text("")
    with pytest.raises(AdapterFileError) as wrong:
        store.verify(digest)
    assert "adapter.lorakit.safetensors: expected no such file" in str(wrong.value)
    assert "adapter_model.safetensors: expected sha256" in str(wrong.value)
    edit(place / "manifest.json", "{")
    with pytest.raises(AdapterFileError, match="remove these from the store"):
        store.manifests()
    store.remove(digest)
    assert store.verify(store.add(tmp_path / "a").digest)


def test_a_digest_is_found_by_its_beginning_where_that_is_unique(store: Store, tmp_path: Path) -> None:
    digest = store.add(folder_of(tmp_path / "a")).digest
    twin = store.get(digest).with_name(digest[:20] + "f" * 44)
    twin.mkdir()
    with pytest.raises(UnknownAdapterError, match=f"{digest[:12]} begins 2 digests; give more digits"):
        store.get(digest[:12])
    twin.rmdir()
    with pytest.raises(UnknownAdapterError, match="is no digest: give 8 to 64"):
        store.get(digest[:7])
    with pytest.raises(UnknownAdapterError, match="is no digest"):
        store.get("../../etc/passwd")
    wrong = digest[:10] + ("0" if digest[10] != "0" else "1")
    with pytest.raises(UnknownAdapterError, match=f"is not in the store .*did you mean '{digest[:11]}'"):
        store.get(wrong)
    store.remove(digest[:10])
    with pytest.raises(UnknownAdapterError, match="is not in the store"):
        store.remove(digest)
    assert contents(store.root) == {}


def test_a_removal_that_is_cut_short_leaves_no_half_adapter(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.add(folder_of(tmp_path / "a")).digest

    def cut(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut)
        with pytest.raises(AdapterFileError, match="cannot be written: Input/output error"):
            store.remove(digest)
    assert store.manifests() == []
    with pytest.raises(UnknownAdapterError):
        store.get(digest)
    Store(store.root)
    assert list((store.root / "adapters").iterdir()) == []


def test_a_store_that_cannot_be_written_is_told_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(tmp_path)

    def forbidden(path: Any, mode: int = 0o777, **_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "mkdir", forbidden)
    with pytest.raises(AdapterFileError, match=f"the store {tmp_path} cannot be written: Permission denied; make room"):
        Store(tmp_path)


def test_what_the_maker_states_is_kept_and_must_fit_the_files(store: Store, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    stated = replace(describe(folder), golden=(Golden((1,), (2, 3)),), licence="mit", evaluation={"loss": 1.5})
    (folder / "manifest.json").write_text(stated.text())
    stored = store.add(folder)
    assert stored == stated
    assert stored.chat_template == "{{ messages }}"
    (folder / "manifest.json").write_text(replace(stated, licence="gpl").text())
    with pytest.raises(AdapterFileError, match="with other statements(.|\n)*licence: stored 'mit', here 'gpl'"):
        store.add(folder)
    (folder / "manifest.json").unlink()
    assert store.add(folder) == stored
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ other }}"}')
    other = store.add(folder)
    assert other.chat_template == "{{ other }}"
    assert other.digest != stored.digest, "the same weights answer otherwise"
    assert store.verify(other.digest) == other
    (folder / "tokenizer_config.json").unlink()
    (folder / "manifest.json").write_text(replace(stated, rank=64).text())
    with pytest.raises(AdapterFileError, match="rank: expected 64, found 2"):
        store.add(folder)
    (folder / "manifest.json").write_text(stated.text())
    folder_of(folder, 9.0)
    with pytest.raises(AdapterFileError, match=r"is not what its manifest\.json says(.|\n)*adapter_model\.safetensors"):
        store.add(folder)


def test_a_template_counts_wherever_it_stands_and_none_changes_nothing(store: Store, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    bare = store.add(folder).digest
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    told = store.add(folder).digest
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert store.add(folder).digest == told != bare
    names = "adapter_config.json adapter_model.safetensors chat_template.jinja lorakit.json"
    command = f"cd {folder} && sha256sum {names} | sha256sum"
    sums = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert sums.stdout.split()[0] == told
    place = store.get(told) / "manifest.json"
    place.chmod(0o644)
    place.write_text(place.read_text().replace("{{ messages }}", "{{ forged }}"))
    with pytest.raises(AdapterFileError, match="its files and template make the digest"):
        store.verify(told)


def test_a_file_that_changes_while_it_is_stored_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "a")
    real = module._copy

    def changed(source: Path, target: Path, expected: File) -> None:
        with source.open("ab") as file:
            file.write(b" ")
        real(source, target, replace(expected, bytes=expected.bytes + 1))

    monkeypatch.setattr(module, "_copy", changed)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json changed while it was read: expected sha256"):
        store.add(folder)
    assert contents(store.root) == {}

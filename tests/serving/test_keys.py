from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.errors import AccessError, ServingError
from lorakit.serving.keys import SCOPES, Key, Keys, add_key, load_keys, new_key


def written(place: Path, *entries: Any, mode: int = 0o600) -> Path:
    file = place / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": list(entries)}))
    file.chmod(mode)
    return file


def test_a_new_key_opens_what_its_entry_says(tmp_path: Path) -> None:
    secret, entry = new_key("web", ["infer", "metrics"], ["support-*"], tenant="shop")
    other, its = new_key("owner", ["admin"])
    keys = load_keys(written(tmp_path, entry, its))
    assert keys.find(secret) == Key("web", frozenset(("infer", "metrics")), ("support-*",), "shop")
    assert keys.find(other).tenant == "owner"
    assert not keys.open


def test_json_is_read_too(tmp_path: Path) -> None:
    secret, entry = new_key("web")
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [entry]}))
    file.chmod(0o644)
    assert load_keys(file).find(secret).name == "web"


def test_the_file_holds_no_key(tmp_path: Path) -> None:
    secret, entry = new_key("web")
    assert secret not in written(tmp_path, entry).read_text()
    assert entry["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert secret != new_key("web")[0]


@pytest.mark.parametrize("secret", [None, "", "lora-guess", "\udce9", "x" * 10_000])
def test_an_unknown_key_is_refused(tmp_path: Path, secret: str | None) -> None:
    keys = load_keys(written(tmp_path, new_key("web")[1]))
    with pytest.raises(AccessError, match="API key"):
        keys.find(secret)


def test_without_keys_everybody_may_do_everything() -> None:
    assert Keys().open
    assert Keys().find(None).scopes == frozenset(SCOPES)


def test_a_key_is_held_to_its_scopes_and_models() -> None:
    key = Key("web", frozenset(("infer",)), ("support-*", "sales"))
    key.need("infer")
    with pytest.raises(AccessError, match="'web' may not do this: it needs the scope admin and has infer"):
        key.need("admin")
    for model in ("support-eu", "support-eu@prod", "sales", "sales@prod", "sales@0123abcd"):
        key.need_model(model)
    for model in ("private", "sales2", "my-support-eu", "private@support-eu", "SALES", ""):
        with pytest.raises(AccessError, match=r"it may ask support-\*, sales"):
            key.need_model(model)


def test_every_key_is_compared_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lorakit.serving import keys as module

    made = [new_key(f"key-{number}") for number in range(5)]
    keys = load_keys(written(tmp_path, *(entry for _, entry in made)))
    compared = []
    real = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append(1) or real(a, b))
    assert keys.find(made[0][0]).name == "key-0"
    assert len(compared) == 5


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, new_key("web")[1], mode=0o666)
    with pytest.raises(ServingError, match=f"run: chmod go-w {file}"):
        load_keys(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scope": ["infer"]}, "unknown field 'scope'; did you mean 'scopes'?"),
        ({"scopes": ["infr"]}, "did you mean 'infer'?"),
        ({"scopes": []}, "scopes is [], expected a list"),
        ({"scopes": "infer"}, "scopes is 'infer', expected a list"),
        ({"sha256": "ABC"}, "64 hexadecimal digits"),
        ({"key": "lora-x"}, "holds hashes alone"),
        ({"models": "all"}, "models is 'all', expected a list"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"tenant": 3}, "tenant is 3"),
    ],
)
def test_a_faulty_entry_says_what_and_where(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ServingError) as refused:
        load_keys(written(tmp_path, new_key("good")[1], new_key("web")[1] | change))
    assert said in str(refused.value)
    assert "key 2: " in str(refused.value)


def test_two_keys_share_neither_name_nor_secret(tmp_path: Path) -> None:
    entry = new_key("web")[1]
    with pytest.raises(ServingError) as refused:
        load_keys(written(tmp_path, entry, entry))
    assert "key 2: has the name of key 1" in str(refused.value)
    assert "key 2: has the sha256 of key 1" in str(refused.value)


@pytest.mark.parametrize("text", ["[", "keys: []", "key: 1", "", "- a", "keys: {a: 1}", "[" * 5000, "\x00"])
def test_a_file_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ServingError):
        load_keys(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="No such file"):
        load_keys(tmp_path / "none.yaml")


def test_a_key_that_no_file_may_have_is_not_made() -> None:
    with pytest.raises(ServingError, match="did you mean 'admin'"):
        new_key("web", ["admn"])  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["keys.json", "keys.yaml"])
def test_a_key_is_added_to_a_file_that_may_be_new(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    first = add_key(file, "web")
    second = add_key(file, "owner", ["admin"], tenant="us")
    keys = load_keys(file)
    assert (keys.find(first).name, keys.find(second).tenant) == ("web", "us")
    assert file.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in tmp_path.iterdir()] == [name]
    with pytest.raises(ServingError, match="has a key 'web' already"):
        add_key(file, "web")


@pytest.mark.parametrize("indent", ["", "  "])
def test_a_file_s_comments_stay_when_a_key_is_added(tmp_path: Path, indent: str) -> None:
    file = tmp_path / "keys.yaml"
    digest = new_key("web")[1]["sha256"]
    text = f"# ours\nkeys:\n{indent}- name: web  # the shop\n{indent}  sha256: {digest}"
    file.write_text(text)
    file.chmod(0o640)
    secret = add_key(file, "owner", ["admin"])
    assert file.read_text().startswith(text)
    assert load_keys(file).find(secret).name == "owner"
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_file_with_faults_is_left_as_it_is(tmp_path: Path) -> None:
    file = written(tmp_path, {"name": "web"})
    before = file.read_text()
    with pytest.raises(ServingError, match="has faults"):
        add_key(file, "owner")
    assert file.read_text() == before


def test_a_digest_is_no_name_that_a_glob_gives_away() -> None:
    digest = "f56b76e2" + "0" * 56
    for globs, may in ((("f*",), False), (("?*",), False), (("*",), True), ((digest,), True), ((digest[:8],), False)):
        assert Key("shop", frozenset({"infer"}), globs).may_ask(digest) is may, globs
    assert Key("shop", frozenset({"infer"}), ("f*",)).may_ask("fables")
    assert Key("shop", frozenset({"infer"}), ("f*",)).may_ask("fables@f56b76e2")

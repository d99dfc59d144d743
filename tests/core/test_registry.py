"""How a method from outside gets its name: refused where it could not be used, and never in place of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from lorakit.core import registry
from lorakit.core.method import Dense, Static
from lorakit.core.registry import method, methods, register
from lorakit.core.spec import AdapterSpec
from lorakit.errors import SpecError
from lorakit.methods.lora import LoRA


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the registry as it was."""
    monkeypatch.setattr(registry, "_registered", {})


def a_method(word: str, *, frozen: bool = True, **members: Any) -> Any:
    """Return a fresh final method called `word`, with other class members."""

    class Negation(Dense):
        """Take a share of the weight away."""

        share: float = 0.0
        name: ClassVar[str] = word
        paper: ClassVar[str] = "none"
        formula: ClassVar[str] = "dW = -share W"
        count: ClassVar[str] = "0"

        def tensors(self, site: Any) -> Any:
            return {}

        def init(self, p: Any, start: Any) -> None:
            pass

        def delta(self, p: Any, weight: Any) -> Any:
            return -self.share * weight

    cls = dataclass(frozen=True)(Negation) if frozen else Negation
    for key, value in members.items():
        setattr(cls, key, value)
    return cls


def test_a_registered_method_is_found_by_name_and_its_spec_survives_json() -> None:
    cls = register(a_method("negation"))
    assert method("negation") is cls
    assert list(methods()) == sorted(methods())
    assert "negation" in methods()
    spec = AdapterSpec(cls(0.5))
    assert AdapterSpec.from_json(spec.to_json()) == spec


def test_without_registration_the_name_is_unknown() -> None:
    a_method("negation")
    with pytest.raises(SpecError, match="unknown method 'negation'.*known: .*lora"):
        method("negation")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(SpecError, match=r"Negation cannot be called 'lora': lorakit.methods.lora.LoRA is; rename it"):
        register(a_method("lora"))
    register(a_method("negation", __qualname__="Other"))
    with pytest.raises(SpecError, match=r"Negation cannot be called 'negation': .*Other is; rename it"):
        register(a_method("negation"))
    assert method("lora") is LoRA


def test_the_same_class_may_come_again_from_a_notebook_or_a_script_that_is_also_imported() -> None:
    register(a_method("negation", __module__="my_methods"))
    again = register(a_method("negation", __module__="__main__"))
    assert method("negation") is again
    register(a_method("second", __module__="theirs"))
    with pytest.raises(SpecError, match="cannot be called 'second'"):
        register(a_method("second", __module__="my_methods"))


@pytest.mark.parametrize(
    ("cls", "complaint"),
    [
        (Static, "is no method that could be used; write what its rung leaves open"),
        (int, "is no method that could be used"),
        (LoRA(), "is no method that could be used"),
        (
            a_method("negation", frozen=False),
            r"Negation is no dataclass; write @dataclass\(frozen=True\) between it and @register",
        ),
        (
            a_method("negation", paper=None, count=None),
            r"Negation does not say its paper, count; add each as a ClassVar\[str\]",
        ),
    ],
)
def test_what_could_not_be_used_is_refused(cls: Any, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        getattr(register, "__wrapped__", register)(cls)  # past the type checks that run with the tests

"""The README.md beside an adapter: what it is, what it sits on, and how to load it."""

from __future__ import annotations

from pathlib import Path

from lorakit.core.init import Init
from lorakit.core.method import Method
from lorakit.core.spec import Override, fields_of
from lorakit.core.state import AdapterState

_MARK = "<!-- written by lorakit; a README.md without this line is left as it is -->"


def card(state: AdapterState) -> str:
    """Return the model card of an adapter as Markdown with the front matter model hubs read."""
    base, spec = state.base.name, state.spec
    method = spec.method and ", ".join(_fields(spec.method))
    whole = sum(t.numel() for t in state.trained.values())
    own = state.parameters - whole
    rows = [
        ("base", base or "unnamed"),
        ("method", f"{spec.name} ({method})" if method else spec.name),
        *[("except", _override(override)) for override in spec.overrides[:8]],
        ("targets", ", ".join(spec.targets.include[:8]) + _more(len(spec.targets.include), 8)),
        ("adapted layers", f"{len(state.updates)}"),
        ("trained whole", ", ".join(spec.train) or "none"),
        ("parameters", f"{own:,} in the updates" + (f", {whole:,} trained whole" if whole else "")),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    front = "\n".join(
        ["---", *([f"base_model: {base}"] if base else []), "library_name: peft", "tags: [lora, lorakit]", "---"]
    )
    return f"""{front}
{_MARK}

# {spec.name} adapter for {base or "an unnamed base"}

| | |
|---|---|
{table}

With PEFT (LoRA in PEFT's format):

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base, "this directory")
```

With lorakit:

```python
import lorakit
lorakit.attach(base, lorakit.load("this directory"))
```
"""


def is_ours(readme: Path) -> bool:
    """Return whether a README.md may be written: there is none, or lorakit wrote it."""
    try:
        return _MARK in readme.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return not readme.exists()


def _fields(method: Method) -> list[str]:
    """Return each field with its value; an initialisation by its name, and only where it is not the usual one."""
    values = {name: (getattr(method, f.name), f.default) for name, f in fields_of(method).items()}
    shown = {k: v for k, (v, usual) in values.items() if not (isinstance(v, Init) and v == usual)}
    return [f"{name} {value.name if isinstance(value, Init) else value}" for name, value in shown.items()]


def _override(override: Override) -> str:
    where = ", ".join(override.targets.include[:4]) + _more(len(override.targets.include), 4)
    layers = f" in layers {override.targets.layers}" if override.targets.layers else ""
    return f"{', '.join(f'{name} {value}' for name, value in override.fields)} at {where}{layers}"


def _more(count: int, shown: int) -> str:
    return f" and {count - shown} more" if count > shown else ""

"""PEFT's `adapter_config.json`: what it says in lorakit's terms, what lorakit does not have, and how ours is written.

Its patterns are regular expressions tried in order against the end of a path, and PEFT re-sorts them when it saves.
Ours are whole paths, escaped and anchored (`^h\\.0\\.attn$`), so no two match one layer and order means nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.core.registry import method as method_named
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec, Override, Targets
from lorakit.core.state import Update
from lorakit.errors import AdapterFileError, SpecError, listing, shown
from lorakit.persist.slices import alpha_for

# Fields with no bearing on what the saved tensors compute: how they were found, drawn or tied, and bookkeeping.
_NO_BEARING = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config "
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save ensure_weight_tying "
    "fan_in_fan_out megatron_core qalora_group_size eva_config".split()
)
_READ = frozenset("r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern init_lora_weights bias".split())
_MOST = 10**9  # a rank or an alpha beyond it is a mistake
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_features(config: Mapping[str, Any]) -> None:
    """Raise `AdapterFileError` naming every feature of a PEFT configuration that lorakit does not have."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterFileError(f"the adapter is of PEFT type {kind!r}; this lorakit reads LORA (and rsLoRA)")
    used = [
        f"{name} = {value!r}"
        for name, value in config.items()
        if name not in _NO_BEARING | _READ and value not in (None, False, {}, [])
    ]
    if config.get("bias", "none") != "none":
        used.append(f"bias = {config['bias']!r}: trained biases")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_MOVE_THE_BASE):
        used.append(
            f"init_lora_weights = {init!r}: it changed the base weights; in PEFT, save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) turns it into a plain LoRA"
        )
    if used:
        raise AdapterFileError(f"the adapter uses what lorakit does not have:\n{listing(used)}")


class Settings:
    """What a PEFT configuration says about each layer's LoRA."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        refuse_features(config)
        if missing := [key for key in ("r", "lora_alpha") if key not in config]:
            raise AdapterFileError(f"the configuration lacks {', '.join(missing)}")
        self.ranks: dict[str, Any] = config.get("rank_pattern") or {}
        self.alphas: dict[str, Any] = config.get("alpha_pattern") or {}
        self.r, self.alpha, self.stabilised = config["r"], config["lora_alpha"], bool(config.get("use_rslora"))
        dropout = config.get("lora_dropout") or 0.0
        if not isinstance(dropout, int | float) or abs(dropout) > _MOST:
            raise AdapterFileError(f"the configuration is wrong: lora_dropout must be a number, not {shown(dropout)}")
        self.dropout = float(dropout)
        self.whole = tuple(config.get("modules_to_save") or ())
        self.method = self._lora(self.r, self.alpha)

    def method_at(self, path: str) -> Any:
        """Return the LoRA of the layer at `path`."""
        return self._lora(_first(self.ranks, path, self.r), _first(self.alphas, path, self.alpha))

    def _lora(self, rank: Any, alpha: Any) -> Any:
        lora: Any = method_named("lora")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or abs(alpha) > _MOST:
            raise AdapterFileError(f"the configuration is wrong: lora_alpha must be a number, not {shown(alpha)}")
        if isinstance(rank, bool) or not isinstance(rank, int) or abs(rank) > _MOST:
            raise AdapterFileError(f"the configuration is wrong: r must be a whole number, not {shown(rank)}")
        try:
            return lora(rank=rank, alpha=float(alpha), stabilised=self.stabilised)
        except SpecError as bad:
            raise AdapterFileError(f"the configuration is wrong: {bad}") from bad

    def spec(self, updates: Sequence[Update], trained: Sequence[str]) -> AdapterSpec:
        """Return the spec that means exactly these updates, with an override for each other rank or alpha."""
        paths = [u.site.path for u in updates]
        groups: dict[tuple[int, float], list[str]] = {}
        for update in updates:
            method: Any = update.method
            if method != self.method:
                groups.setdefault((method.rank, method.alpha), []).append(update.site.path)
        whole = self._saved_whole(trained)
        return AdapterSpec(
            self.method,
            Targets(tuple(exact(path, paths) for path in paths)) if paths else Targets(),
            train=tuple(exact(path, whole) for path in whole),
            dropout=self.dropout,
            overrides=tuple(
                Override(Targets(tuple(exact(p, paths) for p in at)), (("alpha", alpha), ("rank", rank)))
                for (rank, alpha), at in groups.items()
            ),
        )

    def _saved_whole(self, trained: Sequence[str]) -> list[str]:
        """Return the paths PEFT means by `modules_to_save`, an end of the path with or without a dot before it."""
        found: list[str] = []
        for name in trained:
            steps = name.split(".")
            above = [".".join(steps[:n]) for n in range(1, len(steps))]
            hit = next((path for path in above if any(path.endswith(end) for end in self.whole)), None)
            if hit is not None and hit not in found:
                found.append(hit)
        return found


def exact(path: str, among: Sequence[str]) -> str:
    """Return a target pattern that means `path` and no other of these paths."""
    return f"re:{re.escape(path)}" if any(other.endswith(f".{path}") for other in among) else path


def config_of(spec: AdapterSpec, name: str | None, updates: Sequence[Update], whole: Sequence[str]) -> dict[str, Any]:
    """Return the PEFT configuration of whole-layer LoRA updates and of the modules trained whole."""
    stabilised = bool(getattr(spec.method, "stabilised", False))
    setting = {u.site.path: _rank_and_alpha(u, stabilised) for u in updates}
    rank, alpha = Counter(setting.values()).most_common(1)[0][0]
    paths = sorted(setting)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": stabilised,
        "rank_pattern": {_anchored(p): setting[p][0] for p in paths if setting[p][0] != rank},
        "alpha_pattern": {_anchored(p): setting[p][1] for p in paths if setting[p][1] != alpha},
        "target_modules": _targets(paths),
        "modules_to_save": list(whole) or None,
        "lora_dropout": spec.dropout,
        "fan_in_fan_out": _all_transposed([u.site for u in updates]),
        "init_lora_weights": True,
        "bias": "none",
        "use_dora": False,
    }


def _first(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of `path`, as PEFT looks it up."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as bad:
            raise AdapterFileError(f"the pattern {pattern!r} is not a regular expression: {bad}") from None
    return default


def _rank_and_alpha(update: Update, stabilised: bool) -> tuple[int, float]:
    method: Any = update.method
    alpha = method.alpha if method.stabilised == stabilised else alpha_for(method.scale, method.rank, stabilised)
    return method.rank, alpha


def _anchored(path: str) -> str:
    return f"^{re.escape(path)}"


def _targets(paths: list[str]) -> list[str] | str:
    """Return the paths; as one regular expression where a bare name among them would match every path that ends so."""
    if all("." in path for path in paths):
        return paths
    return "|".join(re.escape(path) for path in paths)


def _all_transposed(sites: Sequence[Site]) -> bool:
    flat = [site.kind for site in sites if site.kind in ("linear", "transposed-linear")]
    return bool(flat) and all(kind == "transposed-linear" for kind in flat)

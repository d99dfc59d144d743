"""How should an adapter be put into a live model, and what does each way cost per call?

One LoRA (rank 8) on a 64 x 64 linear layer, put there six ways: lorakit's class swap, the least class swap, a wrapper
module, a forward hook, a torch parametrization, and PEFT. Small on purpose: the arithmetic is nothing, so the time is
the mechanism's.
Writes docs/results/injection.json. Run: python bench/injection.py
"""

from __future__ import annotations

import copy
import io
import pickle
import time
from collections.abc import Callable
from statistics import median

import torch
from record import record
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorakit import AdapterSpec, LoRA, Targets, attach

WIDTH, RANK, ALPHA = 64, 8, 16.0
ROUNDS, CALLS = 15, 2000


class Wrapper(nn.Module):
    """The layer moves one level down, and its keys with it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ALPHA / RANK * (x @ self.down.T @ self.up.T)


class Swapped(nn.Linear):
    """The least class swap: one adapter, no weights, no choice by row."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + ALPHA / RANK * (x @ self.down.T @ self.up.T)


class Sum(nn.Module):
    """The parametrization `W -> W + s B A`, recomputed at each access of `.weight`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ALPHA / RANK * self.up @ self.down


def class_swap(model: nn.Sequential) -> nn.Module:
    attach(model, AdapterSpec(LoRA(rank=RANK, alpha=ALPHA), Targets("*")))
    return model


def bare_swap(model: nn.Sequential) -> nn.Module:
    layer = model[0]
    layer.down = nn.Parameter(torch.randn(RANK, WIDTH))
    layer.up = nn.Parameter(torch.zeros(WIDTH, RANK))
    layer.__class__ = Swapped
    return model


def wrapper(model: nn.Sequential) -> nn.Module:
    model[0] = Wrapper(model[0])
    return model


def hook(model: nn.Sequential) -> nn.Module:
    layer = model[0]
    layer.down = nn.Parameter(torch.randn(RANK, WIDTH))
    layer.up = nn.Parameter(torch.zeros(WIDTH, RANK))
    layer.register_forward_hook(add_branch)
    return model


def add_branch(layer: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
    return y + ALPHA / RANK * (args[0] @ layer.down.T @ layer.up.T)


def parametrization(model: nn.Sequential) -> nn.Module:
    parametrize.register_parametrization(model[0], "weight", Sum(model[0]))
    return model


def peft(model: nn.Sequential) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"]), model)


WAYS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    f.__name__: f for f in (class_swap, bare_swap, wrapper, hook, parametrization, peft)
}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH)).requires_grad_(False)


def make_felt(model: nn.Module) -> None:
    """Give every zero-initialised factor a value, so that a working adapter changes the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.fill_(0.1)


def works(attempt: Callable[[], object]) -> bool:
    try:
        return attempt() is not False
    except Exception:
        return False


def properties(put: Callable[[nn.Sequential], nn.Module]) -> dict[str, bool]:
    """Try on one model each thing a user of the base does with it."""
    plain, x = base(), torch.ones(1, WIDTH)
    model = put(base())
    make_felt(model)
    late = base()
    compiled = torch.compile(late, backend="eager")
    before = compiled(x)
    make_felt(put(late))
    return {
        "base_keys_kept": set(plain.state_dict()) <= set(model.state_dict()),
        "base_checkpoint_loads": works(lambda: not model.load_state_dict(plain.state_dict(), strict=False)[1]),
        "isinstance_kept": isinstance(model[0], nn.Linear),
        "weight_is_the_base_weight": works(lambda: torch.equal(model[0].weight, plain[0].weight)),
        "deepcopy": works(lambda: torch.equal(copy.deepcopy(model)(x), model(x))),
        "pickle": works(lambda: torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))),
        "torch_save": works(lambda: torch.save(model, io.BytesIO())),
        "compile_fullgraph": works(lambda: torch.compile(model, fullgraph=True, backend="eager")(x)),
        "felt_when_attached_after_compile": not torch.equal(compiled(x), before),
    }


@torch.inference_mode()
def microseconds(models: dict[str, nn.Module]) -> dict[str, list[float]]:
    """Time all ways in turn, round by round, so that what the machine does meets all alike."""
    x = torch.ones(1, WIDTH)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                model(x)
            seconds[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return seconds


def main() -> None:
    torch.set_num_threads(1)
    times = microseconds({"no adapter": base(), **{name: put(base()) for name, put in WAYS.items()}})
    microseconds_a_call = {
        name: {"min": round(min(t), 2), "median": round(median(t), 2), "max": round(max(t), 2)}
        for name, t in times.items()
    }
    file = record(
        "injection",
        (__doc__ or "").splitlines()[0],
        ("torch", "peft"),
        setting={"width": WIDTH, "rank": RANK, "batch": 1, "threads": 1, "rounds": ROUNDS, "calls": CALLS},
        microseconds=microseconds_a_call,
        properties={name: properties(put) for name, put in WAYS.items()},
    )
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

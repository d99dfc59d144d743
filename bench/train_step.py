"""What does an adapter add to a training step? Time and kept activations over the floor: the frozen model's forward and
the backward to its input embeddings.

A Llama of 6 layers and width 768, 1,024 tokens, LoRA of rank 16 on every linear layer, of lorakit and of PEFT; DoRA
over LoRA; with dropout 0.05. Every round runs all of them in turn in one process, each step forward and backward with
every label trained and a step of the floor before and after it; the ratios are medians over rounds of a step over the
mean of these two. Kept are the bytes autograd holds between forward and backward, parameters left out.
With one thread the time is the processor's, which other work on the machine does not change.
Run: python bench/train_step.py [--threads 2] [--rounds 9] [--dtypes fp32,bf16] [--cases "lora|peft"] [--keep]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from record import RESULTS, record
from torch import Tensor, nn

from lorakit import AdapterSpec, attach
from lorakit.core.registry import method
from lorakit.inject.fuse import fuse

ROWS, LENGTH, VOCABULARY = 4, 256, 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def base(family: str, dtype: torch.dtype, layers: int) -> Any:
    """Return a frozen model of a family's shape, in training mode."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    configs = {
        "llama": lambda: LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=layers,
                                     num_attention_heads=12, num_key_value_heads=12, vocab_size=VOCABULARY),
        "gpt2": lambda: GPT2Config(n_embd=768, n_layer=layers, n_head=12, vocab_size=VOCABULARY, bos_token_id=0,
                                   eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(configs[family](), attn_implementation="sdpa").to(dtype)
    model.config.use_cache = False
    return model.requires_grad_(False).train()


def ours(model: nn.Module, name: str, dropout: float = 0.0, fused: bool = True) -> nn.Module:
    """Attach lorakit's adapter, a little off its start."""
    lora = method("lora")(16, 32.0)  # type: ignore[call-arg]
    spec = AdapterSpec(lora if name == "lora" else method(name)(lora), dropout=dropout)  # type: ignore[call-arg]
    _nudge(attach(model, spec).parameters())
    if fused:
        fuse(model)
    return model


def theirs(model: nn.Module, name: str, dropout: float = 0.0, **options: Any) -> nn.Module:
    """Attach PEFT's."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear", use_dora=name == "dora")
    wrapped = get_peft_model(model, config, **options)
    _nudge([p for p in wrapped.parameters() if p.requires_grad])
    return wrapped  # type: ignore[no-any-return]


def _nudge(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.01 * torch.randn_like(parameter))


CASES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "lora": lambda m: ours(m, "lora"),
    "lora, plain": lambda m: ours(m, "lora", fused=False),
    "lora, dropout": lambda m: ours(m, "lora", 0.05),
    "dora": lambda m: ours(m, "dora"),
    "dora, dropout": lambda m: ours(m, "dora", 0.05),
    "peft": lambda m: theirs(m, "lora"),
    "peft, adapters in the base's dtype": lambda m: theirs(m, "lora", autocast_adapter_dtype=False),
    "peft, dropout": lambda m: theirs(m, "lora", 0.05),
    "peft, dora": lambda m: theirs(m, "dora"),
    "peft, dora, dropout": lambda m: theirs(m, "dora", 0.05),
}


@dataclass
class Step:
    """One way to train: a model and what it is given."""

    model: Any
    floor: bool
    ids: Tensor

    def forward(self) -> Tensor:
        """Return the mean loss of all tokens."""
        if self.floor:
            inner = self.model.get_input_embeddings()(self.ids).requires_grad_()
            logits = self.model(inputs_embeds=inner).logits
        else:
            logits = self.model(input_ids=self.ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten())

    def seconds(self) -> float:
        """Run forward and backward once, and return the seconds."""
        for parameter in self.model.parameters():
            parameter.grad = None
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        loss = self.forward()
        loss.backward()  # type: ignore[no-untyped-call]
        took = clock() - began
        norm = sum(float(p.grad.float().norm()) for p in self.model.parameters() if p.grad is not None)
        assert self.floor or norm > 0, "nothing was trained"
        return took

    def kept(self) -> int:
        """Return the bytes autograd holds between forward and backward."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        held: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = self.forward()  # noqa: F841 it keeps the graph, so that no address comes twice
        return sum(held.values())


def falls(step: Step, rate: float = 3e-3) -> bool:
    """Return whether three steps of Adam lower the loss."""
    optimizer = torch.optim.Adam([p for p in step.model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(3):
        step.seconds()
        optimizer.step()
        with torch.no_grad():
            losses.append(float(step.forward()))
    return losses[-1] < losses[0]


def study(family: str, dtype: str, cases: list[str], rounds: int, layers: int) -> dict[str, Any]:
    """Return each case's time and kept bytes over the floor's."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    bare = base(family, DTYPES[dtype], layers)
    steps = {"floor": Step(copy.deepcopy(bare), True, ids)}
    steps |= {name: Step(CASES[name](copy.deepcopy(bare)), False, ids) for name in cases}
    del bare
    kept = {name: step.kept() for name, step in steps.items()}
    assert all(falls(step) for name, step in steps.items() if name != "floor"), "a loss does not fall"
    floors, times = [steps["floor"].seconds()], {name: list[float]() for name in cases}
    for name in cases * rounds:
        mine = steps[name].seconds()
        floors.append(steps["floor"].seconds())
        times[name].append(2 * mine / (floors[-2] + floors[-1]))
    found: dict[str, Any] = {"floor_seconds": statistics.median(floors), "floor_kept_mb": kept["floor"] / 1e6}
    for name, ratios in times.items():
        found[name] = {
            "time_over_floor": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "kept_over_floor": round(kept[name] / kept["floor"], 3),
        }
        print(f"{family} {dtype} {name:36} time {found[name]['time_over_floor']:.3f} {found[name]['range']}  "
              f"kept {found[name]['kept_over_floor']:.3f}", flush=True)  # fmt: skip
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--dtypes", default="fp32,bf16")
    options.add_argument("--families", default="llama,gpt2")
    options.add_argument("--cases", default="|".join(CASES), help="separated by |")
    options.add_argument("--keep", action="store_true", help="write docs/results/train-step.json")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    cases = given.cases.split("|")
    file = RESULTS / "train-step.json"
    shapes = json.loads(file.read_text())["shapes"] if given.keep and file.exists() else {}
    for family in given.families.split(","):
        for dtype in given.dtypes.split(","):
            found = study(family, dtype, cases, given.rounds, given.layers)
            shapes[f"{family}, {dtype}"] = {"rounds": given.rounds, "threads": given.threads, **found}
            if given.keep:  # each shape as it is done; the others stay as they were
                record("train-step", "What does an adapter add to a training step?", ("torch", "transformers", "peft"),
                       rows=ROWS, length=LENGTH, shapes=shapes)  # fmt: skip


if __name__ == "__main__":
    main()

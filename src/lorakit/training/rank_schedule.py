"""Rank schedules in a run: between the optimizer's step and the clearing of the gradients, once an optimizer step.

The Trainer calls `on_optimizer_step` exactly there, after the last micro-batch of an accumulated batch, with gradients
that are unscaled and clipped. Sites whose method has the same fields share one budget; an override makes a budget of
its own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.core.method import Method, Schedule, Scheduled, Tensors
from lorakit.core.site import Site
from lorakit.core.spec import AdapterSpec
from lorakit.inject.attach import adapters_named, attach
from lorakit.persist.files import read_safetensors
from lorakit.persist.shard import write_tensors

RANKS = "rank_schedule.safetensors"


class RankSchedules(TrainerCallback):
    """Runs the schedules of an adapter's methods, and keeps their state in each checkpoint; often there is none."""

    def __init__(self, model: nn.Module, steps: int, name: str = "default") -> None:
        """Make the schedules of a run of `steps`.

        Raises:
            SpecError: a run too short for a method's schedule.
        """
        groups: dict[Method, dict[str, tuple[Site, Tensors]]] = {}
        for adapter in adapters_named(model, name):
            if isinstance(adapter.method, Scheduled):
                groups.setdefault(adapter.method, {})[adapter.site.key] = (adapter.site, adapter.tensors())
        self.schedules: list[Schedule] = [
            method.schedule(adapters, steps) for method, adapters in groups.items() if isinstance(method, Scheduled)
        ]
        self._learned = [p for adapters in groups.values() for _, own in adapters.values() for p in own.values()]

    @property
    def settled(self) -> int:
        """Return the step from which on every budget holds; an adapter from before is not what the run is to make."""
        return max((schedule.settled for schedule in self.schedules), default=0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let every schedule act; a step that fp16's scaler skipped has no gradients worth the name."""
        if not self.schedules:
            return
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        if getattr(optimizer, "step_was_skipped", False):
            for tensor in self._learned:
                tensor.grad = None
        for schedule in self.schedules:
            schedule.after_step(state.global_step + 1, optimizer)

    def write(self, folder: Path) -> None:
        """Write the state of the schedules into a checkpoint."""
        if self.schedules:
            states = [schedule.state_dict() for schedule in self.schedules]
            named = {f"{i}/{key}": value for i, own in enumerate(states) for key, value in own.items()}
            write_tensors(folder / RANKS, named)

    def read(self, folder: Path) -> None:
        """Go on from the state in a checkpoint."""
        if self.schedules:
            states: list[dict[str, Tensor]] = [{} for _ in self.schedules]
            for name, value in read_safetensors(folder / RANKS)[0].items():
                i, _, key = name.partition("/")
                states[int(i)][key] = value
            for schedule, own in zip(self.schedules, states, strict=True):
                schedule.load_state_dict(own)


def refuse_schedule(model: nn.Module, spec: AdapterSpec, steps: int) -> None:
    """Raise `SpecError` where a run of `steps` is too short for the schedule of a spec; the model stays as it was."""
    copied = copy.deepcopy(model)
    attach(copied, spec)
    RankSchedules(copied, steps)

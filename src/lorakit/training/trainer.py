"""transformers' Trainer, taught seven things it does not do for an adapter that lives inside the model.

1. A checkpoint holds the adapter alone, is whole or absent, and remembers its recipe.
2. The loss is a sum over trained tokens, divided once by their number in the whole accumulated batch.
3. Parameter groups go by the roles the method declared.
4. The first step is watched: every adapter must be called and reached by a gradient.
5. The order of the rows is a plain function of seed and epoch, and evaluation draws no random number.
6. A method's penalty counts once an optimizer step, its rank schedule acts after it, and no adapter from before the
   schedule is done is ever the best.
7. Where several processes share a run, each takes its part of a step, and numbers and gradients are added up.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lorakit.data import Collator
from lorakit.errors import AdapterFileError, AliveError
from lorakit.inject.alive import alive
from lorakit.inject.attach import state
from lorakit.inject.penalty import penalty
from lorakit.persist.atomic import atomic_directory
from lorakit.persist.native import NATIVE, load_native, write_native
from lorakit.training import processes
from lorakit.training.checkpoints import STATE, Memory, checkpoints, prune, restore
from lorakit.training.finite import FiniteCheck, refuse_exploded
from lorakit.training.groups import param_groups
from lorakit.training.loss import loss_of_batch, mean_loss, trained_labels, untrained
from lorakit.training.optimizers import into_pages, make_optimizer
from lorakit.training.order import Dealt
from lorakit.training.precondition import precondition
from lorakit.training.progress import Progress
from lorakit.training.rank_schedule import RankSchedules
from lorakit.training.recipe import Recipe
from lorakit.training.step import offloaded, uncompiled

if TYPE_CHECKING:
    from datasets import Dataset


class AdapterTrainer(Trainer):
    """Trains the adapter named "default" of a model, and the modules trained whole beside it."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        recipe: Recipe,
        train: Dataset,
        validation: Dataset | None,
        *,
        pad_id: int,
        order: Dealt,
        data: str,
        progress: Progress,
        ranks: RankSchedules,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator=Collator(pad_id),
            train_dataset=train,
            eval_dataset=validation,
            callbacks=[*callbacks, ranks],
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True
        self.adapted, self.folder, self.progress = model, Path(str(args.output_dir)), progress
        self.ranks, self._order = ranks, order
        self.recipe, self.pad_id, self._data = recipe, pad_id, data
        self._proven, self._check_finite = False, FiniteCheck(args.learning_rate)
        self._learned = [p for p in model.parameters() if p.requires_grad]
        self._micro_batch, self._loss_of_step = 0, torch.zeros((), device=args.device)

    # ---- steps ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Dealt:
        return self._order

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the recipe's AdamW over groups by role, its gradients corrected where a method asks for it."""
        if self.optimizer is None:
            train = self.recipe.train
            groups = param_groups(self.adapted, self.args.learning_rate, train.up_ratio, train.weight_decay)
            self.optimizer = make_optimizer(train.optimizer, groups)
            precondition(self.adapted, self.optimizer)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Return this process's micro-batches of one optimizer step, and the number of labels trained in all of them.

        A process that has fewer than the others takes part with a row of which nothing is trained.
        """
        samples = list(islice(epoch_iterator, num_batches))
        trained = sum((trained_labels(batch["labels"]) for batch in samples), torch.tensor(0, device=device))
        counts = processes.total(torch.tensor([sum(_tokens(batch) for batch in samples), int(trained)]))
        self.progress.count(*counts.tolist())
        rows: Any = self.train_dataset
        while len(samples) < num_batches:
            samples.append(untrained(self.data_collator([rows[0]])))
        self._micro_batch, self._loss_of_step = 0, torch.zeros((), device=device)
        return samples, counts[1].to(device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one micro-batch forward and backward; the first one proves the adapter alive.

        Returned, and told as the loss, is the loss of the data alone, of the whole step with its last micro-batch. What
        dropout draws follows from the seed and from which micro-batch of the run this is, whoever computes it.
        """
        of_step = self.args.gradient_accumulation_steps
        steps = self.state.global_step * processes.count() + processes.here()
        torch.manual_seed(_mixed(self.args.seed, steps * of_step + self._micro_batch))
        if self.recipe.train.compile and not self._proven:
            self._prove(model, inputs, num_items_in_batch)
        with nullcontext() if self._proven else alive(self.adapted):
            super().training_step(model, inputs, num_items_in_batch)
        self._proven = True
        self._micro_batch += 1
        self._loss_of_step += self._data_loss
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(self._loss_of_step)
        return processes.add_gradients(self._learned, self._loss_of_step)

    def _prove(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> None:
        """Run the first micro-batch once without compiled code, which cannot be watched, and leave no trace of it."""
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), uncompiled(), alive(self.adapted):
            super().training_step(model, dict(inputs), num_items_in_batch)
        self.adapted.zero_grad()
        self._proven = True

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return this micro-batch's share of the mean loss over the whole accumulated batch, and of the penalty."""
        labels = inputs.pop("labels")
        with offloaded(self.adapted) if self.recipe.train.offload_activations else nullcontext():
            loss, trained = loss_of_batch(model, inputs, labels)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise AliveError(
                "the loss depends on nothing that is trained, so nothing would be learned: the model's forward goes "
                "past what was adapted; choose other targets, or another method"
            )
        share: Tensor = loss / num_items_in_batch
        self._data_loss = share.detach()
        term = penalty(self.adapted)
        return share if term is None else share + term * (trained / num_items_in_batch)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the validation loss per trained token (or row)."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        with uncompiled() if self.recipe.train.compile else nullcontext():
            loss, _ = mean_loss(self.adapted, rows, self.args.per_device_eval_batch_size, self.pad_id)
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Pass the numbers on, unless they say that nothing is being learned."""
        step = self.state.global_step
        self._check_finite(logs, step, scaled=self.accelerator.scaler is not None)
        if logs.get("grad_norm") == 0.0:
            then = f"; the steps before threw the weights off: lower train.lr ({self.args.learning_rate:g})"
            raise AliveError(
                f"step {step}: the gradient of every trained parameter is zero, so nothing is learned"
                f"{then if step > 1 else ''}"
            )
        super().log(logs, start_time)

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter alone, bit for bit."""
        folder, adapter = Path(output_dir) if output_dir else self.folder, state(self.adapted, live=True)
        refuse_exploded(adapter, self.state.global_step, self.args.learning_rate)
        write_native(folder / NATIVE, adapter)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that is whole or absent, then delete what is too old; the others wait for the first."""
        if processes.first():
            self._write_checkpoint()
        processes.wait()

    def _write_checkpoint(self) -> None:
        self.store_flos()
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        try:
            with atomic_directory(folder, clean=True) as draft:
                self._save(str(draft))
                self._save_optimizer_and_scheduler(str(draft))
                self._save_scaler(str(draft))
                self._save_rng_state(str(draft))
                self.state.save_to_json(str(draft / STATE))
                self.ranks.write(draft)
                Memory.of(self.recipe, self._data, self.progress).write(draft)
        except RuntimeError as failed:
            full = "inline_container" in str(failed) or "PytorchStreamWriter" in str(failed)
            reason = os.strerror(errno.ENOSPC) if full else str(failed)  # torch.save's words for a full disk
            intact = "; earlier checkpoints are intact" if checkpoints(self.folder) else ""
            raise AdapterFileError(f"{folder}: could not save: {reason}{intact}") from failed
        prune(self.folder, self.recipe.train.keep, self.state.best_global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.adapted, load_native(resume_from_checkpoint))
        self.ranks.read(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        into_pages(self.optimizer)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Leave out what was measured before the ranks were settled."""
        return self.state.global_step >= self.ranks.settled and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        """Put the adapter with the lowest validation loss back, if it is not the last one."""
        best = self.state.best_global_step
        if best and best != self.state.global_step:
            self._load_from_checkpoint(str(self.folder / f"checkpoint-{best}"))


def _mixed(seed: int, place: int) -> int:
    """Return a seed of its own for each place, far from its neighbours'."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest(), "big")


def _tokens(batch: dict[str, Tensor]) -> int:
    """Count tokens, padding left out; the padding of packed rows, which nothing marks, is counted."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()

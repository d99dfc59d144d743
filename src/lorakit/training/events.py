"""The log of a run: `events.jsonl`, one JSON object a line, which the terminal, the studio and the tests all read.

Every line has `event`, `step` and `time` (seconds since 1970); numbers carry their unit in their name. Nothing about
a run is told in any other place, so a view that is closed and opened again has lost nothing. After a resume, steps
behind the last checkpoint are told again; the later line counts.

    start       model, resumed_from_step, versions_changed {package: [then, now]}
    data        part (train, validation), and the counts of its report
    example     runs [[text, trained, special]] of the first example: what is context and what is trained
    targets     patterns {pattern: modules}, trainable_parameters, base_parameters, percent, trained_whole
    fused       runs {kind: modules} that compute together or keep less, plain {reason: modules} that do not
    recomputed  blocks, of how many, that the backward computes again (train.checkpointing)
    compiled    blocks, fused (false: the compiler fuses what is in them itself)
    plan        task, device, dtype, processes, parallel, steps, steps_per_epoch, batch_rows, accumulation, lr,
                evaluate_every_steps, save_every_steps, packed and why, loss (fused or plain, and why)
    frozen      blocks below the adapter, of how many, whose output is kept in bytes; computed now, in seconds
    step        loss (of the data; a method's penalty is not in it), lr, gradient_norm (null in a step that fp16's
                scaler skipped), epoch, steps, tokens, tokens_per_second, eta_seconds, peak_memory_bytes
    evaluate    loss, perplexity, best_loss, best_step (both null while a rank schedule is at work)
    checkpoint  path
    early_stop  best_step, best_loss, evaluations_since_best
    format      format (native) the adapter is written in, and why not PEFT's
    interrupted path
    end         what run.json holds
    error       kind, message
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.training import processes
from lorakit.training.folder import writing
from lorakit.training.progress import Progress

Event = dict[str, Any]
Listen = Callable[[Event], None]


class EventLog:
    """Appends events to a file, line by line, and hands each one to a listener; of several processes the first does."""

    def __init__(self, file: Path, listen: Listen | None = None) -> None:
        self.file, self._listen, self.stepped = file, listen, False
        if not processes.first():
            return
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)

    def append(self, event: str, step: int = 0, /, **values: Any) -> None:
        """Write one event; a reader never sees half a line that is not the last.

        Raises:
            LorakitError: a disk that takes nothing; the event is not told to the listener either.
        """
        self.stepped |= event == "step"
        if not processes.first():
            return
        made = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        line = json.dumps(made, ensure_ascii=False, allow_nan=False)
        with writing(self.file), self.file.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
        if self._listen is not None:
            self._listen(json.loads(line))  # what a reader of the file would get, to the letter


def read_events(file: str | Path) -> list[Event]:
    """Return the events of a run; a last line cut by a crash is left out."""
    lines = Path(file).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class Narrator(TrainerCallback):
    """Tells the event log what the Trainer does."""

    def __init__(self, log: EventLog, progress: Progress, settled: int = 0) -> None:
        """Tell a best evaluation from step `settled` on, when a rank schedule is done."""
        self._log, self._progress, self._settled = log, progress, settled
        self._began = self._busy = 0.0  # of this sitting, so that the estimate is of this machine
        self._steps = self._tokens = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of one step; evaluation and saving are not part of it."""
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        seconds = time.perf_counter() - self._began
        self._busy += seconds
        self._progress.step_seconds += seconds
        self._steps += 1
        self._tokens += self._progress.tokens_of_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell one optimizer step."""
        if not logs or "grad_norm" not in logs:
            return
        busy = max(self._busy, 1e-9)
        self._log.append(
            "step",
            state.global_step,
            loss=float(logs["loss"]),
            lr=float(logs["learning_rate"]),
            gradient_norm=norm if math.isfinite(norm := float(logs["grad_norm"])) else None,
            epoch=float(state.epoch or 0.0),
            steps=state.max_steps,
            tokens=self._progress.tokens,
            tokens_per_second=self._tokens / busy,
            eta_seconds=(state.max_steps - state.global_step) * busy / self._steps,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell one evaluation."""
        loss = (metrics or {})["eval_loss"]
        counts = state.global_step >= self._settled
        is_best = counts and (state.best_metric is None or loss < state.best_metric)
        self._log.append(
            "evaluate",
            state.global_step,
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            best_loss=loss if is_best else state.best_metric,
            best_step=state.global_step if is_best else state.best_global_step,
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell one checkpoint, once it is whole."""
        self._log.append("checkpoint", state.global_step, path=f"{args.output_dir}/checkpoint-{state.global_step}")


def peak_memory_bytes() -> int:
    """Return the most memory so far: of the CUDA device where there is one in use, else of this process."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak
    try:
        import resource
    except ImportError:  # Windows keeps no such record
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024

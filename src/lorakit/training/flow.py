"""What turns a run from its straight course: a better validation loss, too many worse ones, and the user's Ctrl-C.

All of it is decided from what a checkpoint keeps, so a resumed run turns where an uninterrupted one would.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.training import processes
from lorakit.training.events import EventLog


class KeepBest(TrainerCallback):
    """Saves a checkpoint at every new best validation loss, and stops after `patience` evaluations without one.

    Only evaluations from step `settled` on count, when a rank schedule is done.
    """

    def __init__(self, patience: int | None, log: EventLog, settled: int = 0) -> None:
        self.patience, self._log, self._settled = patience, log, settled

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide after one evaluation, which stands last in the history."""
        if state.global_step < self._settled:
            return
        since = evaluations_since_best(state.log_history, self._settled)
        if since == 0:
            control.should_save = True
        if self.patience is not None and since >= self.patience:
            control.should_training_stop = True
            self._log.append("early_stop", state.global_step, best_step=state.best_global_step,
                             best_loss=state.best_metric, evaluations_since_best=since)  # fmt: skip


def evaluations_since_best(history: list[dict[str, float]], settled: int = 0) -> int:
    """Return how many evaluations came after the one with the lowest loss; the first counts where two are equal.

    Those before step `settled` are left out.
    """
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] >= settled]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class Interrupt(TrainerCallback):
    """Makes the first Ctrl-C a wish: finish this step, save a checkpoint, stop. The second is an order.

    So are SIGTERM, a terminal that is closed (unless `nohup` said to go on), and the end of whoever launched the run's
    processes: nobody could stop them then.
    """

    def __init__(self) -> None:
        self._wished = self.granted = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen for signals inside the block; outside the main thread nobody can, so there nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            numbers.append(hangup)
        before = {number: signal.getsignal(number) for number in numbers}

        def wish(number: int, frame: Any) -> None:
            self._wished = True
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, wish)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fulfil the wish, of any process of the run, at the step's boundary, where a checkpoint is possible."""
        self.granted = processes.any_of(self._wished or processes.orphaned())
        if self.granted:
            control.should_save = control.should_training_stop = True

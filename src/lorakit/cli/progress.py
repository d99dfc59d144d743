"""What a run says while it trains, drawn from its events alone: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from typing import Any

from lorakit.cli.example import show_example
from lorakit.cli.screen import Screen, console, duration, peak, size

LINES = 20  # step lines of a whole run, where there is no terminal


class Progress:
    """A listener for `train(recipe, listen=...)`; use it as a context manager, so that the live line is cleared."""

    def __init__(self, out: Screen) -> None:
        self._out = out
        self._live: Any = None
        self._task: Any = None
        self._steps = 0
        self._device = "cpu"
        self.interrupted = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(self, event: dict[str, Any]) -> None:
        """Say one event."""
        say = getattr(self, f"_on_{event['event']}", None)
        if say is not None:
            say(event)

    def close(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _on_start(self, event: dict[str, Any]) -> None:
        resumed = event["resumed_from_step"]
        self._print(f"base        {event['model']}" + (f", going on from step {resumed}" if resumed else ""))

    def _on_data(self, event: dict[str, Any]) -> None:
        from lorakit.data import DataReport

        fields = DataReport.__dataclass_fields__
        report = DataReport(**{key: value for key, value in event.items() if key in fields})
        for place, line in enumerate(report.lines()):
            self._print(f"{event['part'] if place == 0 else '':<11} {line}")

    def _on_example(self, event: dict[str, Any]) -> None:
        show_example(event["runs"], sys.stderr, f"{'example':<11} ")

    def _on_targets(self, event: dict[str, Any]) -> None:
        for place, (pattern, count) in enumerate(event["patterns"].items()):
            self._print(f"{'targets' if place == 0 else '':<11} {pattern}: {count} layers")
        trained, base = event["trainable_parameters"], event["base_parameters"]
        self._print(
            f"{'trainable':<11} {trained:,} parameters, {event['percent']:.4g} % of base ({base:,}) and adapter"
        )
        if event.get("trained_whole"):
            self._print(f"{'whole':<11} {', '.join(event['trained_whole'])}")
        for told in event["out_of_reach"]:
            self._print(f"{'left out':<11} {told}")

    def _on_fused(self, event: dict[str, Any]) -> None:
        runs = ", ".join(f"{count} {what}" for what, count in event["runs"].items()) or "nothing"
        self._print(f"{'fused':<11} {runs}")
        for reason, count in event["plain"].items():
            self._print(f"{'':<11} {_counted(count, 'adapted layer')} not: {reason}")

    def _on_frozen(self, event: dict[str, Any]) -> None:
        how = f"computed in {duration(event['seconds'])}" if event["computed"] else "there from before"
        self._print(
            f"{'frozen':<11} {event['blocks']} of {event['of']} blocks kept on disk, {size(event['bytes'])}, {how}"
        )

    def _on_recomputed(self, event: dict[str, Any]) -> None:
        self._print(f"{'recomputed':<11} {event['blocks']} of {_counted(event['of'], 'block')} in the backward")

    def _on_compiled(self, event: dict[str, Any]) -> None:
        self._print(f"{'compiled':<11} {_counted(event['blocks'], 'block')}, fused by the compiler alone")

    def _on_plan(self, event: dict[str, Any]) -> None:
        packed = "packed" if event["packed"] else "one example a row"
        self._steps, self._device = event["steps"], event["device"]
        shared = event.get("processes", 1)
        devices = event["device"] if shared == 1 else f"{shared} x {event['device']} ({event['parallel']})"
        self._print(
            f"{'plan':<11} {_counted(event['steps'], 'step')} of "
            f"{_counted(event['batch_rows'] * event['accumulation'], 'row')} ({packed}), "
            f"lr {event['lr']:.2g}, on {devices} in {event['dtype']}"
        )
        if shared == 1 and event["parallel"] != "ddp":
            self._print(f"{'':<11} one process: train.parallel {event['parallel']} divides nothing (--nproc, torchrun)")
        self._print(f"{'loss':<11} {event['loss']}")
        if sys.stderr.isatty():
            self._start()

    def _on_step(self, event: dict[str, Any]) -> None:
        words = (
            f"loss {event['loss']:.4f}  lr {event['lr']:.1e}  {event['tokens_per_second']:,.0f} tokens/s  "
            f"{duration(event['eta_seconds'])} left  {peak(self._device)} {size(event['peak_memory_bytes'])}"
        )
        step, steps = event["step"], event["steps"]
        if self._live is not None:
            self._live.update(self._task, completed=step, words=words)
        elif step in (1, steps) or step % math.ceil(steps / LINES) == 0:
            self._print(f"step {step}/{steps}  {words}")

    def _on_evaluate(self, event: dict[str, Any]) -> None:
        best = "  (best so far)" if event["best_step"] == event["step"] else ""
        self._print(f"step {event['step']}: validation loss {event['loss']:.4f}{best}")

    def _on_early_stop(self, event: dict[str, Any]) -> None:
        self._print(f"stopped early: no better validation loss since step {event['best_step']}")

    def _on_format(self, event: dict[str, Any]) -> None:
        self._print(f"saved in lorakit's own format: {event['why']}")

    def _on_interrupted(self, event: dict[str, Any]) -> None:
        self.interrupted = True

    def _start(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._live = Bar(
            BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[words]}"),
            console=console(sys.stderr), refresh_per_second=4, transient=True,
        )  # fmt: skip
        self._live.start()
        self._task = self._live.add_task("", total=self._steps, words="first step ...")

    def _print(self, line: str) -> None:
        """Print above the live line, or plainly."""
        if self._live is not None:
            self._live.console.print(line, soft_wrap=True)
        else:
            self._out.note(line)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")

"""How far a run has come, over all its sittings: kept in every checkpoint, so that totals survive a resume."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Counts of a run: `seconds` is wall-clock time from the start, `step_seconds` what of it went into steps."""

    tokens: int = 0
    trained_tokens: int = 0
    step_seconds: float = 0.0
    earlier_seconds: float = 0.0
    tokens_of_step: int = 0
    _since: float = field(default_factory=time.perf_counter)

    def count(self, tokens: int, trained: int) -> None:
        """Add one optimizer step's batch."""
        self.tokens += tokens
        self.trained_tokens += trained
        self.tokens_of_step = tokens

    @property
    def seconds(self) -> float:
        """Return the seconds of all sittings."""
        return self.earlier_seconds + time.perf_counter() - self._since

    def to_json(self) -> dict[str, Any]:
        """Return what a later sitting must know."""
        return {
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "step_seconds": round(self.step_seconds, 3),
            "seconds": round(self.seconds, 3),
        }

    def go_on(self, earlier: dict[str, Any]) -> None:
        """Continue from what an earlier sitting wrote."""
        self.tokens, self.trained_tokens = earlier["tokens"], earlier["trained_tokens"]
        self.step_seconds, self.earlier_seconds = earlier["step_seconds"], earlier["seconds"]

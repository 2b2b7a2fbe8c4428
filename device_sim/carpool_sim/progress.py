"""A run's progress, round by round."""

from __future__ import annotations

from carpool.progress import Bar
from carpool_server.hooks import RoundFacts
from carpool_server.privacy.accounting import rounded_up


class ProgressHook:
    """Moves a progress bar by a run's rounds."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._done = 0

    def after_round(self, facts: RoundFacts) -> None:
        """Shows the round's loss or epsilon and its time."""
        record = facts.record
        notes = [f"{record.seconds:.1f} s"]
        if record.mean_loss is not None:
            notes.insert(0, f"loss {record.mean_loss:.3f}")
        if record.epsilon is not None:
            notes.insert(0, f"epsilon {rounded_up(record.epsilon, 2)}")
        if record.rejected:
            notes.append(f"{len(record.rejected)} rejected")
        self._bar.advance(facts.round_number - self._done, note=", ".join(notes))
        self._done = facts.round_number

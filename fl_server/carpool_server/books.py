"""What outlives a run: the population's ledger and participations, opened beside a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from carpool.config import RunConfig
from carpool.errors import PrivacyError
from carpool_server.checkpoint import RunInfo
from carpool_server.participation import Participation
from carpool_server.privacy.accounting import Release
from carpool_server.privacy.ledger import LEDGER_NAME, Ledger, read_promised
from carpool_server.promise import promise_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Books:
    """Open files of a population; None where the mode keeps none.

    Attributes:
        ledger: what was spent; mode ``central``.
        participation: who is in how many rounds; where a cap is kept.
        cap: that cap.
    """

    ledger: Ledger | None = None
    participation: Participation | None = None
    cap: int | None = None

    def eligible(self, devices: Iterable[str], *, run_id: str, number: int) -> list[str]:
        """The devices below their cap, sorted; a round that is done again counts itself not."""
        if self.participation is None or self.cap is None:
            return sorted(devices)
        counts = self.participation.counts(without=(run_id, number))
        return sorted(device for device in devices if counts.get(device, 0) < self.cap)

    def largest_participation(self) -> int:
        """Most rounds that any device is in; 0 where no cap is kept."""
        if self.participation is None:
            return 0
        return max(self.participation.counts().values(), default=0)


@contextmanager
def open_books(path: Path, config: RunConfig, info: RunInfo) -> Iterator[Books]:
    """The population's files, checked against a run's checkpoint.

    Args:
        path: the ledger's; participations lie beside it.
        config: of the run.
        info: of its checkpoint.

    Raises:
        PrivacyError: a file cannot be used, or does not belong to the checkpoint.
    """
    privacy = config.privacy
    promise = promise_of(privacy, population=info.population.digest)
    cap = privacy.max_participations
    ledger = participation = None
    with ExitStack() as stack:
        if promise is not None:
            ledger = stack.enter_context(closing(Ledger(path, promise)))
            ledger.check_covers(info.run_id, info.round_number, head=info.ledger_head)
        if cap is not None:
            participation = stack.enter_context(closing(Participation(participation_path(path))))
            _check_participations(participation, info, ledger)
        yield Books(ledger=ledger, participation=participation, cap=cap)


def history_of(path: Path, config: RunConfig, *, population: str) -> list[Release]:
    """What the population's ledger holds already; nothing where there is none.

    Raises:
        PrivacyError: it cannot be read, or promises something else.
    """
    promise = promise_of(config.privacy, population=population)
    if promise is None or not path.exists():
        return []
    return [charged.charge.release for charged in read_promised(path, promise).charges]


def ledger_path_of(folder: Path, given: Path | None, config: RunConfig) -> Path:
    """Where a run's ledger is: as given, or in the run's own folder.

    A simulation's population is imagined for the run, so each run's own ledger is honest there.

    Raises:
        PrivacyError: a ledger is given to a mode that releases without charging it.
    """
    if given is None:
        return folder / LEDGER_NAME
    if config.privacy.mode != "central":
        raise PrivacyError(
            f"{given}: expected privacy.mode 'central' for a population with a ledger, got "
            f"{config.privacy.mode!r}, which would release what nobody charges. Leave out the "
            "ledger if the devices are imagined for this run."
        )
    return given


def participation_path(ledger: Path) -> Path:
    """Where the participations of a ledger's population are: beside it, under its name."""
    return ledger.with_suffix(".participation.sqlite")


def _check_participations(
    participation: Participation, info: RunInfo, ledger: Ledger | None
) -> None:
    restore = (
        "Restore the newest file that belongs to this population; without it no cap can be kept."
    )
    if participation.total() < info.participations:
        raise PrivacyError(
            f"{participation.path}: expected at least {info.participations} participations, as "
            f"when the run's checkpoint was written, got {participation.total()}. {restore}"
        )
    sizes = participation.sizes()
    for mark in [] if ledger is None else ledger.book.releases:
        # more may be counted than were released: a round that was begun again counts both
        found = sizes.get((mark.run_id, mark.round_number), 0)
        if found < mark.contributors:
            raise PrivacyError(
                f"{participation.path}: expected at least {mark.contributors} devices in round "
                f"{mark.round_number} of run {mark.run_id}, as released, got {found}. {restore}"
            )

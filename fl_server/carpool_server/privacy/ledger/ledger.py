"""What releases have cost a population, on disk before any of them leaves."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from carpool.errors import PrivacyError
from carpool_server.privacy.accounting import (
    Epsilon,
    Release,
    epsilon_at_cap,
    epsilon_of,
    rounded_up,
)
from carpool_server.privacy.ledger.chain import Chain, Link, read_chain
from carpool_server.privacy.ledger.entries import Charge, Charged, Promise, Released, parse_entry

LEDGER_NAME = "ledger.jsonl"


class Book:
    """A ledger's lines, understood.

    Attributes:
        path: the file.
        promise: what is promised, or None before the first line.
        charges: all, in order.
        releases: all, in order.
        hashes: of all lines, in order.

    Raises:
        PrivacyError: a line that is none of a ledger, or in a place where it cannot be.
    """

    def __init__(self, path: Path, links: Sequence[Link]) -> None:
        self.path = path
        self.promise: Promise | None = None
        self.charges: list[Charged] = []
        self.releases: list[Released] = []
        self.hashes: list[str] = []
        for link in links:
            self.take(link)

    def take(self, link: Link) -> None:
        """One more line."""
        try:
            entry = parse_entry(link.entry)
        except ValidationError as error:
            raise PrivacyError(
                f"{self.path}: line {link.number}: expected an entry of a privacy ledger, got "
                f"{link.entry.get('kind')!r}: {error.errors()[0]['msg']}. Read it with the "
                "version of carpool that wrote it."
            ) from error
        if isinstance(entry, Promise) != (self.promise is None):
            raise PrivacyError(
                f"{self.path}: line {link.number}: expected what is promised in the first line "
                f"and nowhere else, got {entry.kind!r}."
            )
        match entry:
            case Promise():
                self.promise = entry
            case Charged():
                self.charges.append(entry)
            case Released():
                self.releases.append(entry)
        self.hashes.append(link.hash)

    def spent(self, more: Sequence[Charge] = ()) -> Epsilon:
        """Epsilon of all charges and of ``more`` after them, an upper bound.

        In regime ``participation-cap`` it is what the dearest ``max_participations`` of them
        cost: what the subject that is in those spent, and no subject is in more.
        """
        if self.promise is None:
            raise ValueError("Expected a ledger with a promise.")
        releases = [c.charge.release for c in self.charges] + [c.release for c in more]
        return epsilon_for(self.promise, releases)


def epsilon_for(promise: Promise, releases: Sequence[Release]) -> Epsilon:
    """What releases cost under a promise's regime."""
    if promise.max_participations is None:
        return epsilon_of(releases, delta=promise.delta)
    return epsilon_at_cap(
        releases, delta=promise.delta, max_participations=promise.max_participations
    )


def read_ledger(path: Path) -> tuple[Book, int]:
    """Reads and verifies a ledger without opening it for charges.

    Returns:
        The ledger, and the bytes of an unfinished last line (see ``read_chain``).

    Raises:
        PrivacyError: it is missing, changed, or no ledger.
    """
    links, torn = read_chain(path)
    return Book(path, links), torn


def read_promised(path: Path, promise: Promise) -> Book:
    """Reads a ledger that must promise what is given.

    Raises:
        PrivacyError: as ``read_ledger``, or it promises something else.
    """
    book, _ = read_ledger(path)
    _check_promise(book, promise)
    return book


class Ledger:
    """The charges of one population, open for more. Close it after use.

    The order of a round: ``quote`` before any device works; ``charge`` before noise is drawn;
    ``mark_released`` before the noised theta leaves. A charge without its mark was not
    released, so its round may be done again under that charge; one with its mark was, or is in
    doubt and counts as such: the round is never noised again.

    Args:
        path: the file; made where it is missing.
        promise: what is promised.

    Raises:
        PrivacyError: the file is no intact ledger, another process charges it, or it promises
            something else.
    """

    def __init__(self, path: Path, promise: Promise) -> None:
        self._chain = Chain(path)
        try:
            self.book = Book(path, self._chain.links)
            if self.book.promise is None:
                self._append(promise)
            _check_promise(self.book, promise)
        except BaseException:
            self.close()
            raise
        self._promise = promise
        self._known: dict[tuple[Release, ...], Epsilon] = {}

    def close(self) -> None:
        """Closes the file."""
        self._chain.close()

    @property
    def head(self) -> str:
        """The last line's hash."""
        return self.book.hashes[-1]

    def quote(self, charge: Charge) -> Epsilon:
        """Epsilon of all charges with this one, whether or not the budget has room for it.

        A round that is charged already costs nothing more.
        """
        charges = [charged.charge for charged in self.book.charges]
        if self._charged(charge) is None:
            charges.append(charge)
        releases = tuple(each.release for each in charges)
        if releases not in self._known:  # the accountants take a second or two
            self._known = {releases: epsilon_for(self._promise, releases)}
        return self._known[releases]

    def affords(self, charge: Charge) -> bool:
        """Whether the budget has room for a charge."""
        try:
            return self.quote(charge).value <= self._promise.epsilon
        except PrivacyError:  # an epsilon that no accountant can state keeps no budget
            return False

    def charge(self, charge: Charge) -> Epsilon:
        """Writes a round's charge, once.

        Guarantees: on return it is durable. A round that is charged already is not charged
        again: nothing of its first attempt was released.

        Returns:
            Epsilon spent with it.

        Raises:
            PrivacyError: the charge would pass the budget, the round is charged otherwise
                already, or it is released. Nothing was written.
        """
        known, path = self._charged(charge), self.book.path
        if known is not None and known != charge:
            raise PrivacyError(f"{path}: expected the charge {known!r}, got {charge!r}.")
        if self.released(charge.run_id, charge.round_number) is not None:
            raise PrivacyError(
                f"{path}: round {charge.round_number} is released. Noised again it would cost "
                "twice; restore the run's newest checkpoint."
            )
        epsilon = self.quote(charge)
        if known is None:
            if epsilon.value > self._promise.epsilon:
                raise PrivacyError(f"{path}: {self.refusal(charge)}")
            self._append(
                Charged(charge=charge, epsilon=epsilon.value, method=epsilon.method, at=_now())
            )
        return epsilon

    def refusal(self, charge: Charge) -> str:
        """Why a charge has no room in the budget."""
        promise = self._promise
        try:
            reached = f"epsilon to {rounded_up(self.quote(charge).value, 3)}"
        except PrivacyError as error:
            reached = f"an epsilon that cannot be stated ({error})"
        return (
            f"round {charge.round_number} would bring {reached} at delta {promise.delta:g}; "
            f"{rounded_up(self.book.spent().value, 3)} of the budget of {promise.epsilon:g} is "
            "spent. Nothing more is released to this population."
        )

    def mark_released(
        self,
        run_id: str,
        round_number: int,
        *,
        theta: str,
        contributors: int,
        largest_participation: int,
    ) -> None:
        """Writes, durably, that a round's noised theta leaves now; again changes nothing.

        Raises:
            PrivacyError: the round is not charged, or another theta left under its name.
        """
        path, known = self.book.path, self.released(run_id, round_number)
        if known is not None:
            if known.theta != theta:
                raise PrivacyError(
                    f"{path}: round {round_number} was released as theta {known.theta[:12]}, got "
                    f"{theta[:12]}. Restore the run's newest checkpoint."
                )
            return
        keys = {(c.charge.run_id, c.charge.round_number) for c in self.book.charges}
        if (run_id, round_number) not in keys:
            raise PrivacyError(f"{path}: expected a charge for round {round_number}, got none.")
        self._append(
            Released(
                run_id=run_id,
                round_number=round_number,
                theta=theta,
                contributors=contributors,
                largest_participation=largest_participation,
                at=_now(),
            )
        )

    def released(self, run_id: str, round_number: int) -> Released | None:
        """The mark of a round's release."""
        for release in self.book.releases:
            if (release.run_id, release.round_number) == (run_id, round_number):
                return release
        return None

    def check_covers(self, run_id: str, round_number: int, *, head: str | None) -> None:
        """Refuses to go on where a checkpoint and this ledger do not belong together.

        Args:
            run_id: the run's.
            round_number: the checkpoint's.
            head: the ledger's last hash when the checkpoint was written.

        Raises:
            PrivacyError: names what was expected and found.
        """
        path = self.book.path
        if head is not None and head not in self.book.hashes:
            raise PrivacyError(
                f"{path}: expected the ledger that the run's checkpoint was written beside, with a "
                f"line {head[:12]}, got another one or lines missing at its end. Restore the "
                "ledger that belongs to this run."
            )
        rounds = [c.charge.round_number for c in self.book.charges if c.charge.run_id == run_id]
        expected = list(range(1, round_number + 1))
        if rounds not in (expected, [*expected, round_number + 1]):
            raise PrivacyError(
                f"{path}: expected a charge for every round up to {round_number}, the "
                f"checkpoint's, and at most one more, got charges for {rounds}. Restore the "
                "ledger that belongs to this run."
            )
        later = [
            r.round_number
            for r in self.book.releases
            if r.run_id == run_id and r.round_number > round_number
        ]
        if later:
            raise PrivacyError(
                f"{path}: expected no release after round {round_number}, the checkpoint's, "
                f"got one of round {later[-1]}. Released again it would have other noise and cost "
                "twice; restore the newest checkpoint."
            )

    def _charged(self, charge: Charge) -> Charge | None:
        for charged in self.book.charges:
            known = charged.charge
            if (known.run_id, known.round_number) == (charge.run_id, charge.round_number):
                return known
        return None

    def _append(self, entry: Promise | Charged | Released) -> None:
        self.book.take(self._chain.append(entry.model_dump(mode="json")))


def _check_promise(book: Book, promise: Promise) -> None:
    if book.promise is None or book.promise == promise:
        return
    parts = [
        f"{name} {getattr(book.promise, name)}, got {getattr(promise, name)}"
        for name in Promise.model_fields
        if getattr(book.promise, name) != getattr(promise, name)
    ]
    raise PrivacyError(
        f"{book.path}: expected the ledger's own {'; '.join(parts)}. A population has one promise "
        "over all its runs: keep to it, or name another population's ledger."
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

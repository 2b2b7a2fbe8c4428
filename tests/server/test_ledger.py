"""Charges: once per round, durable, chained, and never past the budget."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import rfc8785

from carpool.errors import PrivacyError
from carpool_server.privacy.accounting import Release, epsilon_at_cap, epsilon_of
from carpool_server.privacy.ledger import Charge, Ledger, Promise, read_ledger

PROMISE = Promise(population="p", unit="one device", regime="poisson", epsilon=50.0, delta=1e-5)
FIRST = Charge(
    run_id="r",
    round_number=1,
    noise_multiplier=1.0,
    sampling_rate=0.1,
    clip_norm=0.5,
    sigma=0.5,
    num_values=31,
    scale=2**30,
    expected_size=10.0,
)
SECOND = FIRST.model_copy(update={"round_number": 2})
RELEASE = Release(noise_multiplier=1.0, sampling_rate=0.1, num_values=31, scale=2**30)


def opened(path: Path, **changes: object) -> Ledger:
    return Ledger(path, PROMISE.model_copy(update=changes))


CAPPED = {"regime": "participation-cap", "max_participations": 2}
"""Epsilon by the closed form, at once; the accountant takes half a second a time."""


def mark(ledger: Ledger, number: int, theta: str = "a" * 64) -> None:
    ledger.mark_released("r", number, theta=theta, contributors=7, largest_participation=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_a_round_is_charged_once_however_often_it_is_done(path: Path) -> None:
    """Across closing and opening too; what it returns is what the accountant says."""
    with closing(opened(path)) as ledger:
        first = ledger.charge(FIRST)
        assert ledger.charge(FIRST) == first
    with closing(opened(path)) as ledger:
        assert ledger.charge(FIRST) == first
        second = ledger.charge(SECOND)
    book, torn = read_ledger(path)
    assert [charged.charge for charged in book.charges] == [FIRST, SECOND]
    assert torn == 0
    assert first == epsilon_of([RELEASE], delta=1e-5)
    assert second == epsilon_of([RELEASE] * 2, delta=1e-5) == book.spent()


def test_every_line_can_be_checked_with_json_and_sha256_alone(path: Path) -> None:
    """The format as documented, by a second implementation."""
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
        mark(ledger, 1)
    previous = "0" * 64
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        link = json.loads(line)
        found = link.pop("hash")
        assert hashlib.sha256(rfc8785.dumps(link)).hexdigest() == found
        assert (link["number"], link["previous"]) == (number, previous)
        previous = found
    kinds = [json.loads(line)["entry"]["kind"] for line in lines]
    assert kinds == ["opened", "charged", "released"]
    charge = json.loads(lines[1])["entry"]["charge"]
    assert (charge["sigma"], charge["clip_norm"]) == (0.5, 0.5)
    released = json.loads(lines[2])["entry"]
    assert (released["contributors"], released["largest_participation"]) == (7, 2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("change", ["value", "line left out", "lines swapped", "hash rewritten"])
def test_a_changed_line_is_found(path: Path, change: str) -> None:
    """Whatever was changed between the first line and the last."""
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
        ledger.charge(SECOND)
        mark(ledger, 1)
    lines = path.read_text().splitlines()
    where = 2
    if change == "value":
        lines[1] = lines[1].replace('"noise_multiplier":1', '"noise_multiplier":9')
    elif change == "line left out":
        del lines[1]
    elif change == "lines swapped":
        lines[1], lines[2] = lines[2], lines[1]
    else:  # a line that is whole in itself, so the next one betrays it
        link = json.loads(lines[1])
        link["entry"]["charge"]["noise_multiplier"] = 9.0
        link.pop("hash")
        link["hash"] = hashlib.sha256(rfc8785.dumps(link)).hexdigest()
        lines[1] = rfc8785.dumps(link).decode()
        where = 3
    path.write_text("\n".join(lines) + "\n")
    for read in (read_ledger, opened):
        with pytest.raises(PrivacyError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: line {where}: expected the ")


def test_a_torn_last_line_is_no_line(path: Path) -> None:
    """A process killed while it wrote had acknowledged nothing; the next one goes on."""
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
    whole = path.read_bytes()
    with closing(opened(path)) as ledger:
        ledger.charge(SECOND)
    line = path.read_bytes().removeprefix(whole)
    for length in (1, len(line) // 2, len(line) - 1):
        path.write_bytes(whole + line[:length])
        book, torn = read_ledger(path)
        assert (len(book.charges), torn) == (1, length)
        with closing(opened(path)) as ledger:
            assert len(ledger.book.charges) == 1
            assert path.read_bytes() == whole
            ledger.charge(SECOND)
        assert [c.charge for c in read_ledger(path)[0].charges] == [FIRST, SECOND]


_DIES_WHILE_WRITING = """
import os, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_ledger import CAPPED, FIRST, SECOND, mark, opened
from carpool_server.privacy.ledger import chain
ledger = opened(Path({path!r}), **CAPPED)
ledger.charge(FIRST)
count = 0
def dying(name, real):
    def call(*arguments):
        global count
        count += 1
        if count == {fatal}:
            if name == "write":  # a part of the line gets there
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os.kill(os.getpid(), 9)
        return real(*arguments)
    return call
for name in ("write", "fsync"):
    setattr(chain.os, name, dying(name, getattr(os, name)))
ledger.charge(SECOND)
print("charged", flush=True)
mark(ledger, 2)
print("released", flush=True)
"""


@pytest.mark.parametrize("fatal", [1, 2, 3, 4])
def test_kill_between_any_two_writes_never_claims_less_than_was_acknowledged(
    path: Path, fatal: int
) -> None:
    """SIGKILL in each write and each flush: what a caller was told stands in the file."""
    code = _DIES_WHILE_WRITING.format(
        folder=str(Path(__file__).parent), path=str(path), fatal=fatal
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == -9, run.stderr
    told = run.stdout.split()
    with closing(opened(path, **CAPPED)) as ledger:
        assert len(ledger.book.charges) >= 1 + ("charged" in told)
        assert len(ledger.book.releases) >= ("released" in told)
        if not ledger.book.releases:
            ledger.charge(SECOND)
        mark(ledger, 2)
        assert [c.charge for c in ledger.book.charges] == [FIRST, SECOND]


def test_a_disk_that_fails_leaves_the_ledger_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was charged, and the next charge is whole."""
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
        before = path.read_bytes()
        real = os.write
        monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:20]))
        with pytest.raises(PrivacyError, match=r"expected a ledger that can be written, got"):
            ledger.charge(SECOND)
        monkeypatch.undo()
        assert path.read_bytes() == before
        ledger.charge(SECOND)
    assert len(read_ledger(path)[0].charges) == 2


def test_a_charge_past_the_budget_is_refused_and_not_written(path: Path) -> None:
    """Known before any work is asked of devices; refused again by whoever asks again."""
    first = epsilon_of([RELEASE], delta=1e-5).value
    both = epsilon_of([RELEASE] * 2, delta=1e-5).value
    budget = first + 0.01
    for _ in range(2):
        with closing(opened(path, epsilon=budget)) as ledger:
            assert ledger.affords(FIRST)
            ledger.charge(FIRST)
            assert not ledger.affords(SECOND)
            with pytest.raises(PrivacyError) as caught:
                ledger.charge(SECOND)
            assert [c.charge for c in ledger.book.charges] == [FIRST]
    assert str(caught.value) == (
        f"{path}: round 2 would bring epsilon to {both:.3f} at delta 1e-05; {first:.3f} of the "
        f"budget of {budget:g} is spent. Nothing more is released to this population."
    )


def test_a_cap_charges_for_the_dearest_rounds_alone(path: Path) -> None:
    """Nobody is in more of them; the charge that passes the budget is one with less noise."""
    limit = epsilon_at_cap([RELEASE] * 2, delta=1e-5, max_participations=2).value
    changes = {"regime": "participation-cap", "max_participations": 2, "epsilon": limit}
    with closing(opened(path, **changes)) as ledger:
        for number in range(1, 6):
            charge = FIRST.model_copy(update={"round_number": number, "sampling_rate": 1.0})
            spent = ledger.charge(charge)
        assert spent.value == limit
        louder = FIRST.model_copy(update={"round_number": 6, "noise_multiplier": 0.999})
        assert not ledger.affords(louder)


def test_another_charge_for_a_charged_round_is_refused(path: Path) -> None:
    """Less noise after the fact is not the same round."""
    other = FIRST.model_copy(update={"noise_multiplier": 0.5})
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
        with pytest.raises(PrivacyError) as caught:
            ledger.charge(other)
    assert str(caught.value) == f"{path}: expected the charge {FIRST!r}, got {other!r}."


def test_a_released_round_is_not_noised_again(path: Path) -> None:
    """Marked, it counts as released, whether or not anybody has seen it."""
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
        mark(ledger, 1)
        mark(ledger, 1)
        with pytest.raises(PrivacyError) as caught:
            ledger.charge(FIRST)
        assert str(caught.value) == (
            f"{path}: round 1 is released. Noised again it would cost twice; restore the run's "
            "newest checkpoint."
        )
        with pytest.raises(PrivacyError, match="was released as theta aaaaaaaaaaaa, got bbbbbb"):
            mark(ledger, 1, theta="b" * 64)
        with pytest.raises(PrivacyError, match="expected a charge for round 2, got none"):
            mark(ledger, 2)
        assert len(ledger.book.releases) == 1


def test_one_process_at_a_time_charges(path: Path) -> None:
    """Two runs over one population follow each other; a reader is let in."""
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
        with pytest.raises(PrivacyError) as caught:
            opened(path)
        assert len(read_ledger(path)[0].charges) == 1
    assert str(caught.value) == (
        f"{path}: expected a ledger that no process is charging, but one is. Wait for it, or stop "
        "it first."
    )
    opened(path).close()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no ledger\n", "line 1: expected canonical JSON, got: "),
        (b"{}\n", "line 1: number: missing"),
        (b"[1]\n", "line 1: value: "),
        (
            b'{"number":1,"entry":{"a":1152921504606846976},"previous":"%s","hash":"%s"}\n'
            % (b"0" * 64, b"0" * 64),
            "line 1: expected canonical JSON, got: ",
        ),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(path: Path, data: bytes, message: str) -> None:
    """Named with its line."""
    path.write_bytes(data)
    with pytest.raises(PrivacyError) as caught:
        read_ledger(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_missing_ledger_is_named(path: Path) -> None:
    """Reading makes none."""
    with pytest.raises(PrivacyError) as caught:
        read_ledger(path)
    assert str(caught.value) == (
        f"{path}: expected a privacy ledger, got: No such file or directory. Without it nothing "
        "can be said about what was spent; do not release more of this population's data."
    )


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_ledger_that_lacks_or_runs_ahead_of_the_checkpoint_is_refused(
    path: Path, rounds: int
) -> None:
    """A lost ledger is no empty one; a charge for the round under way is as it should be."""
    with closing(opened(path)) as ledger:
        for number in range(1, rounds + 1):
            ledger.charge(FIRST.model_copy(update={"round_number": number}))
        with pytest.raises(PrivacyError) as caught:
            ledger.check_covers("r", 1, head=None)
        ledger.check_covers("r", max(rounds - 1, 0), head=None)
        ledger.check_covers("r", rounds, head=ledger.head)
        ledger.check_covers("another run", 0, head=None)
    assert str(caught.value) == (
        f"{path}: expected a charge for every round up to 1, the checkpoint's, and at most one "
        f"more, got charges for {list(range(1, rounds + 1))}. Restore the ledger that belongs to "
        "this run."
    )


def test_a_ledger_without_the_checkpoints_last_line_is_refused(path: Path) -> None:
    """Lines cut off at the end leave a valid chain: the checkpoint remembers its end."""
    with closing(opened(path)) as ledger:
        ledger.charge(FIRST)
        kept = path.read_bytes()
        ledger.charge(SECOND)
        head = ledger.head
    path.write_bytes(kept)
    with closing(opened(path)) as ledger, pytest.raises(PrivacyError) as caught:
        ledger.check_covers("r", 1, head=head)
    assert str(caught.value) == (
        f"{path}: expected the ledger that the run's checkpoint was written beside, with a line "
        f"{head[:12]}, got another one or lines missing at its end. Restore the ledger that "
        "belongs to this run."
    )

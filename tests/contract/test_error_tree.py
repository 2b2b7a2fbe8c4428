"""The tree of errors is the one that is drawn, and errors cross process boundaries."""

from __future__ import annotations

import pickle

import pytest

import carpool.errors
from carpool.errors import CarpoolError, ContributionRejected, UpdateRejected


def drawn() -> list[tuple[str, str]]:
    """(name, base) for each line of the docstring's tree."""
    pairs: list[tuple[str, str]] = []
    last_at: dict[int, str] = {}
    for line in (carpool.errors.__doc__ or "").splitlines():
        bare = line.lstrip("│├└─ ")
        depth = (len(line) - len(bare)) // 4
        if line.startswith("CarpoolError") or (depth and line[0] in "│├└"):
            name = bare.split()[0]
            last_at[depth] = name
            pairs.append((name, last_at[depth - 1] if depth else "Exception"))
    return pairs


def defined() -> list[tuple[str, str]]:
    kinds: list[type[Exception]] = [CarpoolError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    ours = [kind for kind in kinds if kind.__module__ == "carpool.errors"]
    return [(kind.__name__, kind.__bases__[0].__name__) for kind in ours]


def test_every_error_stands_in_the_tree() -> None:
    """Names and bases, both ways: a new error that is not drawn fails here."""
    assert len(drawn()) > 10
    assert sorted(drawn()) == sorted(defined())


def test_every_error_is_described() -> None:
    """A docstring of its own each."""
    for name, _ in defined():
        assert getattr(carpool.errors, name).__doc__


@pytest.mark.parametrize("kind", [name for name, _ in defined()])
def test_errors_survive_pickling(kind: str) -> None:
    """A worker process of a simulation raises them across a process boundary."""
    extra = {"ContributionRejected": {"sender": "a7"}, "UpdateRejected": {"device_id": "d7"}}
    error = getattr(carpool.errors, kind)("what is wrong", **extra.get(kind, {}))
    found = pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)


def test_rejections_name_their_sender() -> None:
    """In the message and as an attribute."""
    contribution = ContributionRejected("3 values too many.", sender="a7")
    assert str(contribution) == "aggregator a7: 3 values too many."
    assert contribution.sender == "a7"
    update = UpdateRejected("is not finite.", device_id="d7")
    assert str(update) == "device d7: is not finite."
    assert update.device_id == "d7"

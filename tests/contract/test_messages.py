"""Messages between coordinator and aggregators: what goes out comes back, or is refused."""

from __future__ import annotations

import json
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from carpool.errors import MalformedMessage, Refusal
from carpool.privacy import MetricBounds
from carpool.protocol import (
    Contribution,
    ContributionHeader,
    PoolHeader,
    RoundTask,
    TaskHeader,
    Wire,
)
from carpool.recipe import LocalRecipe

HASH = "0123456789abcdef" * 4
RECIPE = LocalRecipe(learning_rate=0.1, epochs=1)

hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
texts = st.text(st.characters(codec="utf-8"), max_size=12)
names = st.lists(texts, max_size=5, unique=True).map(tuple)
finite = st.floats(min_value=1e-300, max_value=1e300)

recipes = st.builds(
    LocalRecipe,
    learning_rate=finite,
    epochs=st.integers(1, 10),
    proximal_weight=st.floats(0, 10),
    example_clip_norm=st.none() | finite,
    train=st.sampled_from([("adapter",), ("head",), ("head", "adapter")]),
)
task_headers = st.builds(
    TaskHeader,
    run_id=texts,
    round_number=st.integers(1, 2**53 - 1),
    bundle_id=hashes,
    layout_id=hashes,
    recipe=recipes,
    order_key=texts,
    clip_norm=finite,
    device_ids=names,
    report_loss=st.booleans(),
    norm_bit=st.booleans(),
    metrics=st.none() | st.builds(MetricBounds, max_loss=st.floats(0.1, 100.0)),
    participations=st.none() | st.dictionaries(texts, st.integers(0, 9), max_size=3),
)
contribution_headers = st.builds(
    ContributionHeader,
    run_id=texts,
    round_number=st.integers(1, 2**53 - 1),
    bundle_id=hashes,
    layout_id=hashes,
    device_ids=names,
    count=st.integers(-(2**53) + 1, 2**53 - 1),
    refused=st.dictionaries(texts, st.sampled_from(get_args(Refusal)), max_size=3),
    num_examples=st.none() | st.integers(0, 2**53 - 1),
    loss_sum=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)


def task_header(**changes: object) -> dict[str, Any]:
    header = TaskHeader(
        run_id="r",
        round_number=1,
        bundle_id=HASH,
        layout_id=HASH,
        recipe=RECIPE,
        order_key="00",
        clip_norm=1.0,
        device_ids=("a",),
        report_loss=True,
        norm_bit=False,
        metrics=None,
        participations=None,
    )
    return header.model_dump(mode="json") | changes


def contribution_header(**changes: object) -> dict[str, Any]:
    header = ContributionHeader(
        run_id="r",
        round_number=1,
        bundle_id=HASH,
        layout_id=HASH,
        device_ids=("a",),
        count=1,
        refused={},
    )
    return header.model_dump(mode="json") | changes


def encoded(header: dict[str, Any]) -> bytes:
    return json.dumps(header).encode()


@settings(deadline=None)
@given(task_headers, stn.arrays(np.float32, st.integers(0, 9)))
def test_a_task_survives_the_wire(header: TaskHeader, theta: np.ndarray) -> None:
    """Every header and every float32, NaN's bits included."""
    found = RoundTask.from_wire(RoundTask(header=header, theta=theta).to_wire())
    assert found.header == header
    assert found.theta.dtype == np.float32
    assert found.theta.tobytes() == theta.tobytes()


@settings(deadline=None)
@given(contribution_headers, stn.arrays(np.int64, st.integers(0, 9)))
def test_a_contribution_survives_the_wire(header: ContributionHeader, total: np.ndarray) -> None:
    """Every header and every int64."""
    found = Contribution.from_wire(Contribution(header=header, total=total).to_wire())
    assert found.header == header
    assert found.total.dtype == np.int64
    np.testing.assert_array_equal(found.total, total)


@settings(deadline=None)
@given(hashes, names)
def test_a_pool_survives_the_wire(hash_: str, device_ids: tuple[str, ...]) -> None:
    """Device ids in any script, in their order."""
    pool = PoolHeader(bundle_id=hash_, layout_id=hash_, device_ids=device_ids)
    assert PoolHeader.from_wire(pool.to_wire()) == pool


def test_equal_messages_have_equal_bytes() -> None:
    """Headers are canonical, so a repeated task can be recognised by its hash."""
    header = TaskHeader.model_validate(task_header())
    backwards = TaskHeader.model_validate(dict(reversed(task_header().items())))
    theta = np.float32([1])
    assert RoundTask(header=header, theta=theta).to_wire() == (
        RoundTask(header=backwards, theta=theta).to_wire()
    )


def test_bodies_are_little_endian() -> None:
    """Literal bytes, also from a big-endian array."""
    header = TaskHeader.model_validate(task_header())
    wire = RoundTask(header=header, theta=np.array([1.0], dtype=">f4")).to_wire()
    assert wire.body == b"\x00\x00\x80\x3f"
    total = Contribution(
        header=ContributionHeader.model_validate(contribution_header()), total=np.int64([-2, 258])
    )
    assert total.to_wire().body == b"\xfe" + b"\xff" * 7 + b"\x02\x01" + b"\x00" * 6


def test_arrays_from_the_wire_are_writable_and_own_their_memory() -> None:
    """An optimiser may work in place without touching the message."""
    wire = Wire(encoded(task_header()), np.float32([1, 2]).tobytes())
    theta = RoundTask.from_wire(wire).theta
    theta += 1
    assert RoundTask.from_wire(wire).theta.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "version: Input should be 1, got 2"),
        ({"round_number": 0}, "round_number: Input should be greater than or equal to 1, got 0"),
        (
            {"round_number": "x"},
            (
                "round_number: Input should be a valid integer, unable to parse "
                "string as an integer, got 'x'"
            ),
        ),
        ({"clip_norm": 0}, "clip_norm: Input should be greater than 0, got 0"),
        ({"clip_norm": None}, "clip_norm: Input should be a valid number, got None"),
        ({"clip_norms": 1}, "clip_norms: unknown field; did you mean 'clip_norm'?"),
        ({"bundle_id": "AB"}, "bundle_id: String should match pattern '^[0-9a-f]{64}$', got 'AB'"),
        ({"device_ids": "a"}, "device_ids: Input should be a valid array, got 'a'"),
        (
            {"recipe": {"learning_rate": 1, "steps": 1, "stps": 1}},
            "recipe.stps: unknown field; did you mean 'steps'?",
        ),
        (
            {"recipe": {"learning_rate": 1}},
            "recipe: expected exactly one of epochs and steps, got epochs=None and steps=None",
        ),
    ],
)
def test_a_mistake_in_a_task_is_named(changes: dict[str, object], reason: str) -> None:
    """The whole message: which message, which field, what was got."""
    with pytest.raises(MalformedMessage) as caught:
        RoundTask.from_wire(Wire(encoded(task_header(**changes)), b""))
    assert str(caught.value) == f"TaskHeader: {reason}"


@pytest.mark.parametrize("name", sorted(task_header().keys() - {"version"}))
def test_a_task_without_a_field_is_refused(name: str) -> None:
    """None of them has a default but the version."""
    header = task_header()
    del header[name]
    with pytest.raises(MalformedMessage) as caught:
        RoundTask.from_wire(Wire(encoded(header), b""))
    assert str(caught.value) == f"TaskHeader: {name}: missing"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"count": 1.5},
            (
                "count: Input should be a valid integer, got a number with a fractional "
                "part, got 1.5"
            ),
        ),
        ({"num_examples": -1}, "num_examples: Input should be greater than or equal to 0, got -1"),
        (
            {"refused": {"a": "unknown document 'd7'"}},
            "refused.a: Input should be "
            + ", ".join(repr(reason) for reason in get_args(Refusal)[:-1])
            + f" or {get_args(Refusal)[-1]!r}, got \"unknown document 'd7'\"",
        ),
        ({"loss_sums": 1}, "loss_sums: unknown field; did you mean 'loss_sum'?"),
    ],
)
def test_a_mistake_in_a_contribution_is_named(changes: dict[str, object], reason: str) -> None:
    """Whether it fits its round is the coordinator's to check."""
    with pytest.raises(MalformedMessage) as caught:
        Contribution.from_wire(Wire(encoded(contribution_header(**changes)), b""))
    assert str(caught.value) == f"ContributionHeader: {reason}"


@pytest.mark.parametrize("header", [b"", b"{", b"\xff", b"[]", b"null", b"9" * 5000])
@pytest.mark.parametrize("kind", [RoundTask, Contribution, PoolHeader])
def test_bytes_that_are_no_header_are_refused(kind: Any, header: bytes) -> None:  # noqa: ANN401
    """Whatever arrives, the receiver gets one error, and a short one."""
    with pytest.raises(MalformedMessage) as caught:
        kind.from_wire(Wire(header, b""))
    assert len(str(caught.value)) < 300


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_random_bytes_are_refused(header: bytes) -> None:
    """No input gets past the one error."""
    with pytest.raises(MalformedMessage):
        Contribution.from_wire(Wire(header, b""))


def test_a_body_of_broken_values_is_refused() -> None:
    """Cut in the middle of a value."""
    with pytest.raises(MalformedMessage) as caught:
        RoundTask.from_wire(Wire(encoded(task_header()), b"12345"))
    assert str(caught.value) == "expected whole values of 4 bytes (<f4), got 5 bytes."
    with pytest.raises(MalformedMessage) as caught:
        Contribution.from_wire(Wire(encoded(contribution_header()), b"1234"))
    assert str(caught.value) == "expected whole values of 8 bytes (<i8), got 4 bytes."

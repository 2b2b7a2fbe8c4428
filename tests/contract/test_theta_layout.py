"""Theta's layout and file: stable ids, exact places, and refusals that name what was found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from carpool.errors import ThetaError
from carpool.theta import Layout, Segment, read_theta, write_theta, zero_theta

BUNDLE_ID = "ab" * 32


def test_layout_id_is_the_hash_of_sorted_compact_json() -> None:
    """Recomputed with the standard library alone: 0.25 and ASCII read the same in RFC 8785."""
    layout = Layout(segments=(Segment(name="head", group="head", shape=(2, 3), scale=0.25),))
    text = json.dumps(
        {"segments": [{"group": "head", "name": "head", "scale": 0.25, "shape": [2, 3]}]},
        sort_keys=True,
        separators=(",", ":"),
    )
    assert layout.id == hashlib.sha256(text.encode()).hexdigest()


def test_layout_id_never_changes() -> None:
    """A literal: thetas written by an earlier version must keep their layout."""
    layout = Layout(segments=(Segment(name="head", group="head", shape=(2, 3), scale=0.25),))
    assert layout.id == "0ac2f8775064d48d98c244881f02846d02f69c08f4f1fc334e27cf3ad9aed6c2"


@pytest.mark.parametrize(
    "change", [{"name": "h"}, {"group": "adapter"}, {"shape": (3, 2)}, {"scale": 0.5}]
)
def test_layout_id_depends_on_every_field(change: dict[str, object]) -> None:
    """Two layouts that differ in anything do not exchange thetas."""
    segment = Segment(name="head", group="head", shape=(2, 3), scale=0.25)
    other = Segment.model_validate(segment.model_dump() | change)
    assert Layout(segments=(segment,)).id != Layout(segments=(other,)).id


def test_segments_follow_each_other_and_are_scaled(layout: Layout) -> None:
    """Places are cumulative lengths; parameters are scale * theta in row-major order."""
    theta = np.arange(8, dtype=np.float32)
    assert layout.num_values == 8
    assert layout.slices() == {"adapter.scale": slice(0, 4), "head.core": slice(4, 8)}
    parameters = layout.parameters(theta)
    np.testing.assert_array_equal(parameters["adapter.scale"], np.float32([0, 0.25, 0.5, 0.75]))
    np.testing.assert_array_equal(parameters["head.core"], np.float32([[4, 5], [6, 7]]))
    assert all(p.dtype == np.float32 for p in parameters.values())


def test_group_mask_marks_the_groups_values(layout: Layout) -> None:
    """A recipe that trains the head leaves the adapter's values."""
    assert layout.group_mask(("head",)).tolist() == [False] * 4 + [True] * 4
    assert layout.group_mask(("adapter", "head")).all()


def test_another_catalogue_resizes_the_last_segment_alone(layout: Layout) -> None:
    """A value per document is theta's end, so what stands before it keeps its places."""
    bias = Segment(name="head.bias", group="head", shape=(3,), scale=0.5)
    biased = Layout(segments=(*layout.segments, bias))
    larger = biased.for_documents(5)
    assert larger.segments[:-1] == layout.segments
    assert larger.segments[-1] == bias.model_copy(update={"shape": (5,)})
    assert larger.num_values == biased.num_values + 2
    assert larger.slices()["head.bias"] == slice(8, 13)
    assert larger.id != biased.id
    assert biased.segments[-1] == bias
    assert larger.for_documents(3) == biased
    assert larger.for_documents(3).id == biased.id


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_layout_needs_segments_with_distinct_names(names: list[str]) -> None:
    """A name that stands twice would make two places of one parameter."""
    segments = tuple(Segment(name=n, group="head", shape=(1,), scale=1.0) for n in names)
    with pytest.raises(ValidationError, match="expected at least one segment and distinct names"):
        Layout(segments=segments)


def test_theta_survives_its_file_bit_for_bit(tmp_path: Path, layout: Layout) -> None:
    """Subnormal and negative zero included."""
    theta = np.float32([0.0, -0.0, 1e-45, -3.4e38, 1 / 3, 1, 2, 3])
    path = tmp_path / "theta.safetensors"
    write_theta(path, theta, layout=layout, bundle_id=BUNDLE_ID, round_number=7)
    found = read_theta(path, layout=layout, bundle_id=BUNDLE_ID)
    assert found.tobytes() == theta.tobytes()


def test_theta_of_another_layout_is_refused(tmp_path: Path, layout: Layout) -> None:
    """Same length, other meaning."""
    other = Layout(segments=(Segment(name="x", group="head", shape=(8,), scale=1.0),))
    path = tmp_path / "theta.safetensors"
    write_theta(path, zero_theta(other), layout=other, bundle_id=BUNDLE_ID, round_number=0)
    with pytest.raises(ThetaError) as caught:
        read_theta(path, layout=layout, bundle_id=BUNDLE_ID)
    assert str(caught.value) == (
        f"{path}: expected a theta of layout {layout.id}, got layout {other.id}. "
        "Use the theta that was trained for this bundle."
    )


@pytest.mark.parametrize("written_for", ["cd" * 32, None])
def test_theta_of_another_bundle_is_refused(
    tmp_path: Path, layout: Layout, written_for: str | None
) -> None:
    """Same layout, other model; also the untrained theta out of another bundle's folder."""
    path = tmp_path / "theta.safetensors"
    write_theta(path, zero_theta(layout), layout=layout, bundle_id=written_for, round_number=0)
    with pytest.raises(ThetaError) as caught:
        read_theta(path, layout=layout, bundle_id=BUNDLE_ID)
    assert str(caught.value) == (
        f"{path}: expected a theta of bundle {BUNDLE_ID}, got bundle {written_for}. "
        "Use the theta that was trained for this bundle."
    )


def test_safetensors_of_another_kind_is_refused(tmp_path: Path, layout: Layout) -> None:
    """An array named theta is not enough."""
    path = tmp_path / "theta.safetensors"
    save_file({"theta": zero_theta(layout)}, path)
    with pytest.raises(ThetaError) as caught:
        read_theta(path, layout=layout, bundle_id=BUNDLE_ID)
    assert str(caught.value) == (
        f"{path}: expected a theta of format carpool-theta-1, got format None. "
        "Use the theta that was trained for this bundle."
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_theta_is_neither_written_nor_read(
    tmp_path: Path, layout: Layout, bad: float
) -> None:
    """One poisoned value is counted and refused on both sides."""
    theta = zero_theta(layout)
    path = tmp_path / "theta.safetensors"
    write_theta(path, theta, layout=layout, bundle_id=BUNDLE_ID, round_number=0)
    metadata = {"format": "carpool-theta-1", "layout": layout.id, "bundle": BUNDLE_ID}
    theta[3] = bad
    message = f"{path}: 1 of 8 values are not finite."
    with pytest.raises(ThetaError) as caught:
        write_theta(path, theta, layout=layout, bundle_id=BUNDLE_ID, round_number=0)
    assert str(caught.value) == message
    assert read_theta(path, layout=layout, bundle_id=BUNDLE_ID).tolist() == [0.0] * 8
    save_file({"theta": theta}, path, metadata=metadata)
    with pytest.raises(ThetaError) as caught:
        read_theta(path, layout=layout, bundle_id=BUNDLE_ID)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("theta", "got"),
    [
        (np.zeros(7, np.float32), "float32 of shape (7,)"),
        (np.zeros(8, np.float64), "float64 of shape (8,)"),
        (np.zeros((2, 4), np.float32), "float32 of shape (2, 4)"),
    ],
)
def test_theta_of_another_shape_or_dtype_is_refused(
    layout: Layout, theta: np.ndarray, got: str
) -> None:
    """The message has both shapes and both dtypes."""
    with pytest.raises(ThetaError) as caught:
        layout.check(theta, source="phone")
    assert str(caught.value) == (
        f"phone: expected float32 values of shape (8,) for layout {layout.id[:12]}, got {got}."
    )


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_truncated_theta_is_refused(tmp_path: Path, layout: Layout, size: int) -> None:
    """Cut anywhere: in the length, in the header, in the values."""
    path = tmp_path / "theta.safetensors"
    write_theta(path, zero_theta(layout), layout=layout, bundle_id=BUNDLE_ID, round_number=0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ThetaError) as caught:
        read_theta(path, layout=layout, bundle_id=BUNDLE_ID)
    assert str(caught.value).startswith(f"{path}: expected a theta in safetensors form, got: ")


@pytest.mark.parametrize("kind", ["text", "missing", "directory", "other array"])
def test_what_is_no_theta_is_refused(tmp_path: Path, layout: Layout, kind: str) -> None:
    """Whatever stands at the path, the error is ours and names it."""
    path = tmp_path / "theta.safetensors"
    if kind == "text":
        path.write_text("not safetensors at all, but long enough to have a header length")
    elif kind == "directory":
        path.mkdir()
    elif kind == "other array":
        save_file({"weights": zero_theta(layout)}, path)
    with pytest.raises(ThetaError) as caught:
        read_theta(path, layout=layout, bundle_id=BUNDLE_ID)
    assert str(caught.value).startswith(f"{path}: expected a theta in safetensors form, got: ")

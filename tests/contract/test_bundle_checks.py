"""A bundle is used whole and unchanged, or refused with file, expected and found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rfc8785
from pydantic import ValidationError
from safetensors.numpy import save_file

from carpool.bundle import Bundle, Manifest, finish_bundle, staging_folder
from carpool.bundle.manifest import Dimension, Method, Range, Signature, TensorSpec
from carpool.errors import BundleError, ThetaError
from carpool.theta import Layout

MakeBundle = Callable[..., Bundle]

FILES = (
    "corpus.safetensors",
    "documents.jsonl",
    "golden.safetensors",
    "program.pte",
    "theta.safetensors",
    "tokenizer.json",
)


def rewrite(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> Path:
    path = bundle.path / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    return str(caught.value)


def test_a_finished_bundle_opens_with_everything_in_it(make_bundle: MakeBundle) -> None:
    """What went in comes out, and nothing but the listed files and the manifest is there."""
    made = make_bundle()
    bundle = Bundle.open(made.path)
    assert bundle == made
    assert {p.name for p in bundle.path.iterdir()} == {*FILES, "manifest.json"}
    assert set(bundle.manifest.files) == set(FILES)
    assert [d.id for d in bundle.documents()] == ["d0", "d1", "d2"]
    assert bundle.initial_theta().tolist() == [0.0] * 8
    assert bundle.corpus()["basis"].shape == (4, 2)
    arrays, texts = bundle.golden()
    assert arrays["expected_loss"].tolist() == [1.5]
    assert texts == ["héllo"]


def test_the_shipped_theta_is_read_like_a_trained_one(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """It names no bundle, so a copy of it elsewhere is refused."""
    bundle = make_bundle()
    assert bundle.read_theta(bundle.path / "." / "theta.safetensors").tolist() == [0.0] * 8
    copy = tmp_path / "theta.safetensors"
    copy.write_bytes(bundle.theta_path.read_bytes())
    with pytest.raises(
        ThetaError, match=f"expected a theta of bundle {bundle.id}, got bundle None"
    ):
        bundle.read_theta(copy)


def test_id_is_the_hash_of_the_canonical_manifest_without_signature(
    make_bundle: MakeBundle,
) -> None:
    """Recomputed from the file alone, as another implementation would."""
    bundle = make_bundle()
    content = json.loads((bundle.path / "manifest.json").read_text(encoding="utf-8"))
    del content["signature"]
    assert bundle.id == hashlib.sha256(rfc8785.dumps(content)).hexdigest()


def test_id_does_not_depend_on_the_signature(make_bundle: MakeBundle) -> None:
    """A bundle is signed after its id is known."""
    bundle = make_bundle()
    signature = {"algorithm": "Ed25519", "key_id": "k", "value": "v"}
    rewrite(bundle, lambda content: content.update(signature=signature))
    signed = Bundle.open(bundle.path)
    assert signed.manifest.signature == Signature(algorithm="Ed25519", key_id="k", value="v")
    assert signed.id == bundle.id


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_refused(make_bundle: MakeBundle, name: str) -> None:
    """In every file, at the start, in the middle and at the end."""
    bundle = make_bundle()
    path = bundle.path / name
    original = path.read_bytes()
    for place in (0, len(original) // 2, len(original) - 1):
        changed = bytearray(original)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert refusal(bundle.path) == (
            f"{path}: expected SHA-256 {hashlib.sha256(original).hexdigest()}, found "
            f"{hashlib.sha256(changed).hexdigest()}. Copy the bundle again."
        )


def test_a_changed_byte_in_the_manifest_is_refused_or_gives_another_bundle(
    make_bundle: MakeBundle,
) -> None:
    """At places all over it: never the same id for other content (white space is not content)."""
    bundle = make_bundle()
    path = bundle.path / "manifest.json"
    original = path.read_bytes()
    meaning = json.loads(original)
    taken_for_the_same = []
    for place in range(0, len(original), 7):
        changed = bytearray(original)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            found = Bundle.open(bundle.path)
        except BundleError:
            continue
        if found.id == bundle.id and json.loads(changed) != meaning:
            taken_for_the_same.append(place)
    assert not taken_for_the_same


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(make_bundle: MakeBundle, name: str) -> None:
    """One byte is enough; the sizes stand in the message."""
    bundle = make_bundle()
    path = bundle.path / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert refusal(bundle.path) == (
        f"{path}: expected {len(content)} bytes, found {len(content) - 1}. Copy the bundle again."
    )


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(make_bundle: MakeBundle, name: str) -> None:
    """It is named before anything is used."""
    bundle = make_bundle()
    path = bundle.path / name
    size = path.stat().st_size
    path.unlink()
    assert refusal(bundle.path) == (
        f"{path}: expected {size} bytes, found no file. Copy the bundle again."
    )


def test_a_directory_in_a_files_place_is_refused(make_bundle: MakeBundle) -> None:
    """A directory has a size too, on some file systems even the right one."""
    bundle = make_bundle()
    path = bundle.path / "program.pte"
    path.unlink()
    path.mkdir()
    assert refusal(bundle.path) == (
        f"{path}: expected a file, found a directory. Copy the bundle again."
    )


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    """The message says how to get one."""
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected a bundle with a manifest.json, found none. "
        "Make one with `carpool export`."
    )


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 2', b"\xff\xfe"])
def test_a_manifest_that_is_no_json_is_refused(make_bundle: MakeBundle, content: bytes) -> None:
    """Truncated or binary."""
    bundle = make_bundle()
    path = bundle.path / "manifest.json"
    path.write_bytes(content)
    assert refusal(bundle.path).startswith(f"{path}: expected JSON, got: ")


def test_a_key_that_stands_twice_is_refused(make_bundle: MakeBundle) -> None:
    """Parsers differ in which one they take, so two devices could read two manifests."""
    bundle = make_bundle()
    path = bundle.path / "manifest.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"min": 1', '"min": 1, "min": 1'), encoding="utf-8")
    assert refusal(bundle.path) == f"{path}: expected JSON, got: the key 'min' twice in one object"


@pytest.mark.parametrize("version", [1, 3, 5, "4", None])
def test_another_schema_version_is_refused(make_bundle: MakeBundle, version: object) -> None:
    """Before anything else of the manifest is read."""
    path = rewrite(make_bundle(), lambda content: content.update(schema_version=version, new=1))
    assert refusal(path.parent) == (
        f"{path}: expected schema version 4, got {version!r}. Export the bundle again with this "
        "version of carpool, or use the version it came from."
    )


def test_a_manifest_that_is_a_list_is_refused(make_bundle: MakeBundle) -> None:
    """JSON, but no object."""
    bundle = make_bundle()
    (bundle.path / "manifest.json").write_text("[]")
    assert "expected schema version 4, got None" in refusal(bundle.path)


def test_an_unknown_manifest_field_is_refused(make_bundle: MakeBundle) -> None:
    """At the top and inside a union's member; the nearest known name is offered."""
    bundle = make_bundle()
    path = rewrite(bundle, lambda content: content.update(logit_scal=1))
    assert refusal(bundle.path) == f"{path}: logit_scal: unknown field; did you mean 'logit_scale'?"
    rewrite(bundle, lambda content: (content.pop("logit_scal"), content["head"].update(ranc=1)))
    assert refusal(bundle.path) == f"{path}: head.core.ranc: unknown field; did you mean 'rank'?"


def test_a_missing_manifest_field_is_refused(make_bundle: MakeBundle) -> None:
    """No field has a silent default."""
    path = rewrite(make_bundle(), lambda content: content.pop("golden"))
    assert refusal(path.parent) == f"{path}: golden: missing"


def test_a_changed_layout_is_refused(make_bundle: MakeBundle) -> None:
    """A scale that is off by a factor would be a silent change of the learning rate."""
    bundle = make_bundle()
    path = rewrite(bundle, lambda content: content["layout"]["segments"][0].update(scale=0.5))
    changed = Layout.model_validate(json.loads(path.read_text(encoding="utf-8"))["layout"])
    assert refusal(bundle.path) == (
        f"{path}: expected layout id {changed.id}, got {bundle.manifest.layout_id}."
    )


@pytest.mark.parametrize("name", ["../secret", "a/b", ".hidden", "/etc/passwd", "", "a\\b"])
def test_a_file_outside_the_folder_is_refused(make_bundle: MakeBundle, name: str) -> None:
    """A manifest cannot make a device read or hash what is not the bundle's."""
    bundle = make_bundle()
    path = rewrite(bundle, lambda content: content["program"].update(file=name))
    assert refusal(bundle.path).startswith(f"{path}: program.file: String should match pattern")
    rewrite(
        bundle,
        lambda content: (
            content["program"].update(file="program.pte"),
            content["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}),
        ),
    )
    assert "String should match pattern" in refusal(bundle.path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_hash_is_refused(make_bundle: MakeBundle, name: str) -> None:
    """Leaving a file out of the list would leave it unchecked."""
    path = rewrite(make_bundle(), lambda content: content["files"].pop(name))
    assert refusal(path.parent) == (
        f"{path}: value: expected files to list every file in use, got no ['{name}']"
    )


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        (
            {"documents": np.zeros((4, 4), np.float32), "basis": np.zeros((4, 2), np.float32)},
            "expected documents of float32 (3, 4), got float32 (4, 4).",
        ),
        (
            {"documents": np.zeros((3, 4), np.float64), "basis": np.zeros((4, 2), np.float32)},
            "expected documents of float32 (3, 4), got float64 (3, 4).",
        ),
        (
            {"documents": np.zeros((3, 4), np.float32), "basis": np.zeros((2, 4), np.float32)},
            "expected basis of float32 (4, 2), got float32 (2, 4).",
        ),
        (
            {"documents": np.zeros((3, 4), np.float32)},
            "expected basis of float32 (4, 2), got no such array.",
        ),
    ],
)
def test_a_corpus_of_another_shape_is_refused(
    tmp_path: Path,
    fill: Callable[[Path], None],
    fields: dict[str, Any],
    arrays: dict[str, np.ndarray],
    found: str,
) -> None:
    """Right hash, wrong content: an exporter's mistake, or a corpus of another bundle."""
    destination = tmp_path / "bundle"
    with staging_folder(destination) as staging:
        fill(staging)
        save_file(arrays, staging / "corpus.safetensors")
        bundle = finish_bundle(staging, destination, fields)
    with pytest.raises(BundleError) as caught:
        bundle.corpus()
    assert str(caught.value) == f"{destination / 'corpus.safetensors'}: {found}"


@pytest.mark.parametrize("read", [Bundle.corpus, Bundle.golden])
def test_arrays_that_cannot_be_read_are_refused(
    make_bundle: MakeBundle, read: Callable[[Bundle], object]
) -> None:
    """A file that changed after the bundle was opened is still an error of ours."""
    bundle = make_bundle()
    for name in ("corpus.safetensors", "golden.safetensors"):
        (bundle.path / name).write_bytes(b"no safetensors")
    with pytest.raises(BundleError, match=r"\.safetensors: expected safetensors, got: "):
        read(bundle)


def test_an_existing_destination_is_refused_and_untouched(make_bundle: MakeBundle) -> None:
    """A second export does not replace the first."""
    bundle = make_bundle()
    before = snapshot(bundle.path)
    with pytest.raises(BundleError) as caught:
        make_bundle()
    assert str(caught.value) == (
        f"{bundle.path}: expected a path where nothing is yet. Choose another, or remove it first."
    )
    assert snapshot(bundle.path) == before


def test_a_destination_that_appears_meanwhile_is_refused_and_untouched(
    tmp_path: Path, fill: Callable[[Path], None], fields: dict[str, Any]
) -> None:
    """The slower of two exports loses; nothing of it stays."""
    destination = tmp_path / "bundle"

    def export() -> None:
        with staging_folder(destination) as staging:
            fill(staging)
            destination.mkdir()
            (destination / "other").write_text("kept")
            finish_bundle(staging, destination, fields)

    with pytest.raises(BundleError, match="expected a path where nothing is yet, got: "):
        export()
    assert snapshot(tmp_path) == {"bundle/other": b"kept"}


def test_nothing_appears_when_a_field_is_wrong(
    tmp_path: Path, fill: Callable[[Path], None], fields: dict[str, Any]
) -> None:
    """The manifest is checked before anything is moved, and the staging folder goes."""

    def export() -> None:
        with staging_folder(tmp_path / "bundle") as staging:
            fill(staging)
            finish_bundle(staging, tmp_path / "bundle", fields | {"logit_scale": -1.0})

    with pytest.raises(ValidationError):
        export()
    assert snapshot(tmp_path) == {}


def test_nothing_appears_when_the_writer_fails(
    tmp_path: Path, fill: Callable[[Path], None]
) -> None:
    """A failed parity gate, for example."""

    def export() -> None:
        with staging_folder(tmp_path / "bundle") as staging:
            fill(staging)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        export()
    assert snapshot(tmp_path) == {}


def test_a_range_must_hold_a_value() -> None:
    """A program that can be called with no batch at all is a mistake."""
    with pytest.raises(ValidationError, match="expected min <= max, got 3 and 2"):
        Range(min=3, max=2)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([], r"expected bounds of \['batch', 'documents'\], got \[\]"),
        (["batch"], r"expected bounds of \['batch', 'documents'\], got \['batch'\]"),
        (
            ["batch", "documents", "length"],
            r"expected bounds of \['batch', 'documents'\], got \['batch', 'documents', 'length'\]",
        ),
        (
            ["batch", "documents", "values"],
            r"expected bounds of \['batch', 'documents'\], got \['batch', 'documents', 'values'\]",
        ),
    ],
)
def test_a_method_bounds_what_its_calls_choose_and_nothing_else(
    bounds: list[Dimension], message: str
) -> None:
    """Of inputs and outputs; theta's length follows from the documents and has no bounds."""
    theta = TensorSpec(name="theta", dtype="float32", shape=("values",))
    weights = TensorSpec(name="example_weights", dtype="float32", shape=("batch",))
    scores = TensorSpec(name="scores", dtype="float32", shape=("batch", "documents"))

    def method(*names: Dimension) -> Method:
        ranges = {name: Range(min=1, max=8) for name in names}
        return Method(bounds=ranges, inputs=(theta, weights), outputs=(scores,))

    assert method("documents", "batch").bounds.keys() == {"batch", "documents"}
    with pytest.raises(ValidationError, match=message):
        method(*bounds)


@pytest.mark.parametrize("name", ["gradients", "scores", "embed"])
def test_a_program_without_one_of_its_methods_is_refused(
    make_bundle: MakeBundle, name: str
) -> None:
    """When the bundle is opened, not when a device first needs the method."""
    path = rewrite(make_bundle(), lambda content: content["program"]["methods"].pop(name))
    assert refusal(path.parent) == (
        f"{path}: program: expected gradients, scores and embed, got no ['{name}']"
    )


def test_a_method_of_a_fixed_batch_is_refused(make_bundle: MakeBundle) -> None:
    """A device packs as many queries as there are, as long as they are."""

    def fix(content: dict[str, Any]) -> None:
        embed = content["program"]["methods"]["embed"]
        del embed["bounds"]["batch"]
        for spec in (*embed["inputs"], *embed["outputs"]):
            spec["shape"] = [1 if size == "batch" else size for size in spec["shape"]]

    path = rewrite(make_bundle(), fix)
    assert refusal(path.parent) == (
        f"{path}: program: embed: expected bounds of batch and length, got no ['batch']"
    )


def test_manifest_round_trips_through_json(make_bundle: MakeBundle) -> None:
    """What is written is what is read, floats and non-ASCII text included."""
    manifest = make_bundle().manifest
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert manifest.licences[0].notice == "für alle"


def snapshot(folder: Path) -> dict[str, bytes]:
    def files() -> Iterator[Path]:
        return (p for p in folder.rglob("*") if p.is_file())

    return {str(p.relative_to(folder)): p.read_bytes() for p in files()}

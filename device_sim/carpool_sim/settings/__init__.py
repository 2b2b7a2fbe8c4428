"""Settings that work, one file per preset and privacy mode; copy one to start your own."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from carpool.config import RunConfig, load_config
from carpool.errors import ConfigError
from carpool.schema import nearest


def packaged_settings(name: str, *, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The settings shipped as ``name``, for example ``"small-central"``.

    Args:
        name: of the file, without ``.toml``.
        overrides: ``"key=value"``, as ``carpool.config.load_config`` takes them.

    Raises:
        ConfigError: no such file, or an override that does not fit.
    """
    resource = files(__package__) / f"{name}.toml"
    if not resource.is_file():
        raise ConfigError(
            f"settings {name!r}: expected a TOML file or the name of shipped settings"
            f"{nearest(name, packaged_names())}"
        )
    with as_file(resource) as path:
        return load_config(Path(path), overrides=overrides)


def find_settings(name_or_path: str, *, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The settings of a TOML file, or those shipped under a name.

    Args:
        name_or_path: a file's path; or, where there is no such file, a name.
        overrides: ``"key=value"``.

    Raises:
        ConfigError: neither a file nor a known name, or settings that do not fit.
    """
    path = Path(name_or_path)
    if path.exists() or path.suffix == ".toml":
        return load_config(path, overrides=overrides)
    return packaged_settings(name_or_path, overrides=overrides)


def packaged_names() -> list[str]:
    """The names that ``packaged_settings`` knows."""
    names = (Path(entry.name) for entry in files(__package__).iterdir())
    return sorted(path.stem for path in names if path.suffix == ".toml")

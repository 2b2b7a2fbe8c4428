from pathlib import Path

import pytest
import tiny

from carpool.bundle import Bundle
from carpool_device.runtime import DeviceProgram


@pytest.fixture(scope="session")
def tiny_pte() -> bytes:
    return tiny.program_bytes()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pte: bytes, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny.write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", tiny_pte)


@pytest.fixture(scope="session")
def tiny_program(tiny_bundle: Bundle) -> DeviceProgram:
    return DeviceProgram.load(tiny_bundle)


@pytest.fixture
def make_tiny(tiny_pte: bytes, tmp_path: Path):  # noqa: ANN201  a factory for one test
    """Writes a tiny bundle with some manifest fields changed."""

    def make(**changes: object) -> Bundle:
        return tiny.write_tiny_bundle(tmp_path / "changed", tiny_pte, **changes)

    return make

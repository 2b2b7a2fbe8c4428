from __future__ import annotations

import importlib.metadata
import os

import numpy as np
import pytest
import tiny

from carpool.errors import DeviceError
from carpool_device import private
from carpool_device.runtime import DeviceProgram, use_threads


def test_the_private_names_are_where_they_were(tiny_program: DeviceProgram) -> None:
    """When this fails, look at ``carpool_device/private.py`` and say there what was tried."""
    assert tiny_program
    assert importlib.metadata.version("executorch").startswith("1.5.")
    for name in (private.POOL_SIZE, private.RESET_POOL):
        assert callable(getattr(private._bindings(), name))


@pytest.mark.parametrize("count", [1, 3, 2])
def test_the_number_of_threads_is_the_one_asked_for(
    tiny_program: DeviceProgram, count: int
) -> None:
    """And the program goes on working with it."""
    use_threads(count)
    assert getattr(private._bindings(), private.POOL_SIZE)() == count
    ids = np.ones((2, 3), np.int64)
    theta = np.zeros(tiny.LAYOUT.num_values, np.float32)
    assert np.isfinite(tiny_program.scores(theta, ids, ids)).all()


def test_no_threads_are_refused() -> None:
    """Zero would mean the default, silently."""
    with pytest.raises(DeviceError, match=r"^expected at least 1 thread, got 0\.$"):
        use_threads(0)


def test_a_runtime_that_cannot_choose_its_threads_says_so(
    tiny_program: DeviceProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading still works there: only the choice is refused."""
    assert tiny_program
    monkeypatch.setattr(private, "_bindings", object)
    private.start_thread_pool()
    with pytest.raises(DeviceError, match=r"has no _unsafe_reset_threadpool"):
        private.resize_thread_pool(2)


def test_only_the_runtimes_notices_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    """Standard error is back afterwards, also after an error inside."""

    def fail() -> None:
        with private._muted_standard_error():
            os.write(2, b"dropped")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    os.write(2, b"kept")
    assert capfd.readouterr().err == "kept"

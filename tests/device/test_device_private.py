from __future__ import annotations

import importlib.metadata
import os

import numpy as np
import pytest
import tiny

from carpool.errors import DeviceError
from carpool.native import muted_standard_error
from carpool_device import private
from carpool_device.runtime import DeviceProgram, use_threads


def test_the_private_names_are_where_they_were(tiny_program: DeviceProgram) -> None:
    """When this fails, look at ``carpool_device/private.py`` and say there what was tried."""
    assert tiny_program
    assert importlib.metadata.version("executorch").startswith("1.5.")
    for name in (private.POOL_SIZE, private.RESET_POOL):
        assert callable(getattr(private._bindings(), name))


def test_threads_cannot_be_taken_from_a_loaded_program(tiny_program: DeviceProgram) -> None:
    """A method keeps the threads it found: the runtime would crash in its next call."""
    tokens = tiny_program.tokenizer.pack([np.ones(3, np.int64)] * 2)
    tiny_program.scores(np.zeros(tiny.LAYOUT.num_values, np.float32), tokens)
    with pytest.raises(DeviceError) as caught:
        use_threads(1)
    assert str(caught.value) == (
        "expected use_threads(1) before the first program is used, got it after. "
        "Call it when the process starts."
    )


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
        with muted_standard_error():
            os.write(2, b"dropped")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    os.write(2, b"kept")
    assert capfd.readouterr().err == "kept"

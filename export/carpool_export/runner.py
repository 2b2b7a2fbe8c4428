"""The plain ExecuTorch runtime, as far as the exporter needs it to check its own work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from executorch.runtime import Runtime
from torch import Tensor

from carpool.native import muted_standard_error


class LoadedProgram:
    """A ``.pte`` whose methods can be called.

    Holds program and methods together, because the runtime keeps neither alive for the other
    (a crash later; tried on ExecuTorch 1.5.1).
    """

    def __init__(self, path: Path, methods: Sequence[str]) -> None:
        self._program = Runtime.get().load_program(path)
        # the runtime's threads start here, and print about files that only exist on ARM
        with muted_standard_error():
            self._methods = {name: self._program.load_method(name) for name in methods}

    def call(self, method: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The method's outputs, copied: the next call overwrites the runtime's own.

        Args:
            method: its name.
            inputs: exactly as many as it has; fewer would silently reuse earlier ones.

        Raises:
            ValueError: another number of inputs.
        """
        loaded = self._methods[method]
        expected = loaded.metadata.num_inputs()
        if len(inputs) != expected:
            raise ValueError(f"{method}: expected {expected} inputs, got {len(inputs)}.")
        return [output.clone() for output in loaded.execute(inputs)]

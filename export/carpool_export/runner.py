"""The plain ExecuTorch runtime, as far as the exporter needs it to check its own work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from executorch.runtime import Runtime
from torch import Tensor

from carpool.bundle.manifest import Method
from carpool.native import muted_standard_error


class LoadedProgram:
    """A ``.pte`` whose methods can be called by their inputs' names.

    Holds program and methods together, because the runtime keeps neither alive for the other
    (a crash later; tried on ExecuTorch 1.5.1).
    """

    def __init__(self, path: Path, methods: Mapping[str, Method]) -> None:
        self._program = Runtime.get().load_program(path)
        self._inputs = {
            name: tuple(spec.name for spec in method.inputs) for name, method in methods.items()
        }
        # the runtime's threads start here, and print about files that only exist on ARM
        with muted_standard_error():
            self._methods = {name: self._program.load_method(name) for name in methods}

    def call(self, method: str, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The method's outputs, copied: the next call overwrites the runtime's own.

        Args:
            method: its name.
            values: its inputs by name; others are left out.

        Raises:
            ValueError: the program takes another number of inputs than it was opened with.
        """
        loaded = self._methods[method]
        inputs = [values[name].contiguous() for name in self._inputs[method]]
        expected = loaded.metadata.num_inputs()
        if len(inputs) != expected:  # some runtimes reuse earlier ones for fewer
            raise ValueError(f"{method}: expected {expected} inputs, got {len(inputs)}.")
        return [output.clone() for output in loaded.execute(inputs)]

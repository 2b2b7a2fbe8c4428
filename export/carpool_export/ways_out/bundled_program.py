"""A bundle's program and golden step in one file, as ExecuTorch's own runners replay it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from executorch.devtools.bundled_program.config import MethodTestCase, MethodTestSuite
from executorch.devtools.bundled_program.core import BundledProgram
from executorch.devtools.bundled_program.serialize import (
    serialize_from_bundled_program_to_flatbuffer,
)
from torch import Tensor

from carpool.bundle import Bundle, require_nothing_at
from carpool.bundle.manifest import Method
from carpool.files import write_atomically


def write_bundled_program(bundle_path: Path, destination: Path) -> None:
    """Writes the program with one test case a method: the golden step and what eager gives for it.

    Any ExecuTorch runner with bundled programs (``executor_runner --bundled_program_path``, the
    Python ``load_bundled_program``) can replay it; compare within the manifest's tolerances.

    Args:
        bundle_path: a bundle.
        destination: the ``.bpte``; nothing may be there yet.

    Raises:
        BundleError: the bundle is damaged, or something is at ``destination``.
    """
    require_nothing_at(destination)
    bundle = Bundle.open(bundle_path)
    arrays, _ = bundle.golden()
    values = {name: torch.from_numpy(array) for name, array in arrays.items()}
    suites = [
        MethodTestSuite(name, [_test_case(method, values)])
        for name, method in bundle.manifest.program.methods.items()
    ]
    program = BundledProgram(None, suites, pte_file_path=str(bundle.program_path))
    write_atomically(destination, bytes(serialize_from_bundled_program_to_flatbuffer(program)))


def _test_case(method: Method, values: Mapping[str, Tensor]) -> MethodTestCase:
    expected = {"embeddings": "expected_embed"}
    return MethodTestCase(
        inputs=[values[spec.name] for spec in method.inputs],
        expected_outputs=[
            values[expected.get(spec.name, f"expected_{spec.name}")] for spec in method.outputs
        ],
    )

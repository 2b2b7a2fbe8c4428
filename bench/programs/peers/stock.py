"""ExecuTorch's own way to train: its export of forward and backward pass, and its lowering.

``_export_forward_backward`` is a private name of torch, tried on torch 2.13.0; it is what
ExecuTorch 1.5.1's own training examples call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor
from torch.export.experimental import _export_forward_backward
from torch.export.graph_signature import OutputKind
from transformers import PreTrainedModel

from bench.programs.names import PORTABLE, XNNPACK
from bench.programs.peers.modules import StepModule
from bench.programs.peers.peer import Peer, Ready
from bench.programs.subject import Step, Subject


def peers(
    subject: Subject, model: PreTrainedModel, step: Step, *, threads: int, folder: Path
) -> Iterator[Peer]:
    """The plain step of this shape alone, with portable kernels and with XNNPACK.

    XNNPACK's partitioner as it comes; and without copies, which it refuses when they are all
    that stands between a delegate's input and its output (tried on ExecuTorch 1.5.1).

    Args:
        subject: the bundle.
        model: with eager attention, which has no operator of its own to lower.
        step: the step.
        threads: ExecuTorch's.
        folder: for the programs, for as long as they are called.
    """
    batch = step.batch
    inputs = (batch.input_ids, batch.attention_mask, batch.labels)

    @functools.cache  # all variants start from one export
    def exported() -> tuple[StepModule, Any]:
        module = StepModule(subject, model)
        return module, _export_forward_backward(torch.export.export(module, inputs))

    def ready(partitioners: list[XnnpackPartitioner], path: Path) -> Ready:
        module, program = exported()
        lowered = to_edge_transform_and_lower(program, partitioner=partitioners).to_executorch()
        with path.open("wb") as file:
            lowered.write_to_file(file)
        loaded = Runtime.get().load_program(path)
        method = loaded.load_method("forward")
        places = {
            module_name(spec.target): place
            for place, spec in enumerate(program.graph_signature.output_specs)
            if spec.kind == OutputKind.GRADIENT_TO_PARAMETER
        }

        def read(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
            gradients = {
                name: outputs[places[name.replace(".", "_")]].clone() for name in module.leaves
            }
            return outputs[0].reshape(1).clone(), module.flat(gradients)

        def call(_kept: object = loaded) -> list[Tensor]:  # the method does not keep its program
            outputs: list[Tensor] = method.execute(inputs)
            return outputs

        return Ready(call, read)

    without_copies = [
        config for config in ALL_PARTITIONER_CONFIGS if "clone" not in config.target_name
    ]
    for name, variant, partitioners in (
        (PORTABLE, "", []),
        (XNNPACK, "as it comes", [XnnpackPartitioner()]),
        (XNNPACK, "without copies", [XnnpackPartitioner(configs=without_copies)]),
    ):
        path = folder / f"{name} {variant} {step.shape}.pte"
        yield Peer(
            name=name,
            variant=variant,
            threads=threads,
            make=functools.partial(ready, partitioners, path),
            slow=True,
        )


def module_name(parameter: str) -> str:
    """The module that a parameter such as ``head_core.weight`` is of."""
    return parameter.rpartition(".")[0]

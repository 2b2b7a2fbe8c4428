"""Opacus's clipped step: gradients per example, their norms, one clipped sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.programs.names import L2_CLIP_NORM, OPACUS
from bench.programs.peers.modules import Scale, Shift, StepModule
from bench.programs.peers.peer import Peer, Ready
from bench.programs.subject import Step, Subject

AGREES = 1e-4
"""Its norms come from ``Tensor.norm`` in float32, which over the 230,000 values of a row per
document was off by 3.6e-5 (torch 2.13.0); the gradient before clipping is not."""


def _scale_gradients(
    layer: Scale, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    products = torch.einsum("n...k,n...k->nk", activations[0], backprops)
    return {layer.values: layer.scale * products}


def _shift_gradients(
    layer: Shift, _activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    return {layer.values: layer.scale * torch.einsum("n...k->nk", backprops)}


# Without these Opacus would take its slower general way for these two layers.
register_grad_sampler(Scale)(_scale_gradients)
register_grad_sampler(Shift)(_shift_gradients)


def peers(
    subject: Subject, models: Mapping[str, PreTrainedModel], step: Step, *, threads: int
) -> Iterator[Peer]:
    """Each attention at one thread and at all."""
    for attention, model in models.items():

        def ready(model: PreTrainedModel = model) -> Ready:
            return _ready(subject, model, step)

        for count in sorted({1, threads}):
            yield Peer(
                name=OPACUS,
                variant=f"{attention} attention",
                threads=count,
                make=ready,
                clipped=True,
                agrees=AGREES,
            )


def _ready(subject: Subject, model: PreTrainedModel, step: Step) -> Ready:
    """No noise, which is the server's here, and no update of the parameters."""
    module = StepModule(subject, model)
    module.train()  # Opacus looks at layers in training mode alone
    model.train(mode=False)
    wrapped = GradSampleModule(module, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD([module.parameter(name) for name in module.leaves], lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=L2_CLIP_NORM,
        expected_batch_size=step.shape.batch,
        loss_reduction="mean",
    )
    batch = step.batch

    def call() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = wrapped(batch.input_ids, batch.attention_mask, batch.labels)
        torch.autograd.backward(loss)
        optimizer.pre_step()
        return loss

    def read(loss: Tensor) -> tuple[Tensor, Tensor]:
        gradients = {name: _gradient(module.parameter(name)) for name in module.leaves}
        return loss.detach().reshape(1), module.flat(gradients)

    return Ready(call, read)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("expected a gradient of every segment, got none.")
    return parameter.grad

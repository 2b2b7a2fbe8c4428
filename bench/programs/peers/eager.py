"""Eager PyTorch, and the same through torch.compile: the plain backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.programs.names import COMPILED, EAGER
from bench.programs.peers.peer import Peer, Ready
from bench.programs.subject import Step, Subject
from carpool_export.model import Readout
from carpool_export.reference import Batch, Reference, after_pooling

ATTENTIONS = ("eager", "sdpa")
"""The library's own; the faster one counts."""


def embed_padded(model: PreTrainedModel, soft: Tensor, mask: Tensor, readout: Readout) -> Tensor:
    """Embeddings, shape ``(B, D)``, of all rows at once, with their padding on the right.

    Args:
        model: the frozen model.
        soft: token embeddings behind the adapter, shape ``(B, T, d)``.
        mask: int64, shape ``(B, T)``; 1 for a token.
        readout: how token states become an embedding.
    """
    states = model(inputs_embeds=soft, attention_mask=mask).last_hidden_state
    if readout.pooling == "mean":
        real = mask.unsqueeze(-1).to(states.dtype)
        return after_pooling((states * real).sum(1) / real.sum(1), readout)
    if readout.pooling == "cls":
        return after_pooling(states[:, 0], readout)
    return after_pooling(states[torch.arange(len(mask)), mask.sum(1) - 1], readout)


class PaddedReference(Reference):
    """The eager step as one writes it for speed."""

    def _embed(self, parameter: dict[str, Tensor], batch: Batch) -> Tensor:
        soft = self._soft(parameter, batch.input_ids)
        return embed_padded(self.model, soft, batch.attention_mask, self.readout)


def eager_peers(
    subject: Subject, models: Mapping[str, PreTrainedModel], step: Step, *, threads: int
) -> Iterator[Peer]:
    """Each attention at one thread and at all."""
    for attention, model in models.items():
        reference = subject.reference(PaddedReference, model)

        def ready(reference: PaddedReference = reference) -> Ready:
            return Ready(lambda: reference.plain_gradients(subject.theta, step.batch), tuple)

        for count in sorted({1, threads}):
            yield Peer(name=EAGER, variant=f"{attention} attention", threads=count, make=ready)


def compiled_peers(
    subject: Subject, models: Mapping[str, PreTrainedModel], step: Step, *, threads: int
) -> Iterator[Peer]:
    """The loss compiled with its derivative, for this shape alone."""
    for attention, model in models.items():
        reference = subject.reference(PaddedReference, model)
        for count in sorted({1, threads}):

            def ready(reference: PaddedReference = reference, count: int = count) -> Ready:
                loss_of = torch.compile(
                    reference.loss,
                    dynamic=False,
                    # no code of another shape or number of threads from a cache
                    options={"cpp.threads": count, "fx_graph_cache": False},
                )

                def call() -> tuple[Tensor, Tensor]:
                    variable = subject.theta.clone().requires_grad_()
                    loss = loss_of(variable, step.batch)
                    (gradient,) = torch.autograd.grad(loss, variable)
                    return loss.detach().reshape(1), gradient

                return Ready(call, tuple)

            yield Peer(name=COMPILED, variant=f"{attention} attention", threads=count, make=ready)

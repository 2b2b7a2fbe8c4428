"""Ranking many clients' queries with a bundle's program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from carpool.data.corpus import Example
from carpool.errors import DeviceError
from carpool_device.evaluation.metrics import Ranking, ranks_of
from carpool_device.runtime import DeviceProgram
from carpool_device.tokenizer import QueryTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queries:
    """Tokenised queries with their answers: prepared once, ranked as often as theta changes.

    Attributes:
        rows: token ids of each query.
        right: int64, shape ``(Q,)``: the right document's place in the catalogue.
        client: int64, shape ``(Q,)``: the query's client, as a place in ``clients``.
        clients: names; each has at least one query.
    """

    rows: list[NDArray[np.int64]]
    right: NDArray[np.int64]
    client: NDArray[np.int64]
    clients: tuple[str, ...]


def prepare_queries(
    tokenizer: QueryTokenizer,
    document_index: Mapping[str, int],
    examples_by_client: Mapping[str, Sequence[Example]],
) -> Queries:
    """Tokenises every query, in the order of the mapping.

    Args:
        tokenizer: the bundle's.
        document_index: ``DeviceProgram.document_index``.
        examples_by_client: clients without examples are left out.

    Raises:
        DeviceError: no query at all, or an unknown document id.
    """
    right, client, clients = index_answers(examples_by_client, document_index)
    texts = [example.query for examples in examples_by_client.values() for example in examples]
    return Queries(rows=tokenizer.encode(texts), right=right, client=client, clients=clients)


def rank_queries(
    program: DeviceProgram,
    theta: NDArray[np.float32],
    queries: Queries,
    *,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Ranking:
    """Where ``theta`` puts each query's right document.

    Args:
        program: of the bundle that ``theta`` belongs to.
        theta: float32, shape ``(P,)``.
        queries: from ``prepare_queries``.
        on_progress: called with the number of queries just done.

    Raises:
        ThetaError: theta does not fit the bundle's layout.
        DeviceError: the runtime failed, or a score is NaN.
    """
    ranks = np.zeros(len(queries.rows), dtype=np.int64)
    for places, scores in program.score_rows(theta, queries.rows):
        ranks[places] = ranks_of(scores, queries.right[places])
        on_progress(len(places))
    return Ranking(ranks=ranks, client=queries.client, clients=queries.clients)


def evaluate_theta(
    program: DeviceProgram,
    tokenizer: QueryTokenizer,
    theta: NDArray[np.float32],
    examples_by_client: Mapping[str, Sequence[Example]],
) -> Ranking:
    """``prepare_queries`` and ``rank_queries`` in one, for a theta that is looked at once."""
    queries = prepare_queries(tokenizer, program.document_index, examples_by_client)
    return rank_queries(program, theta, queries)


def index_answers(
    examples_by_client: Mapping[str, Sequence[Example]], document_index: Mapping[str, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str, ...]]:
    """The right document's place and the client's place of each query, and the clients.

    Raises:
        DeviceError: no query at all, or an unknown document id.
    """
    clients = tuple(client for client, examples in examples_by_client.items() if examples)
    if not clients:
        raise DeviceError("expected at least one query to rank, got none.")
    right, owner = [], []
    for place, client in enumerate(clients):
        for example in examples_by_client[client]:
            if example.document not in document_index:
                raise DeviceError(
                    f"client {client}: unknown document id {example.document!r}; expected one of "
                    f"the bundle's {len(document_index)} documents."
                )
            right.append(document_index[example.document])
            owner.append(place)
    return np.array(right, dtype=np.int64), np.array(owner, dtype=np.int64), clients

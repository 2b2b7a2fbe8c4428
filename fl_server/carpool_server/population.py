"""Who is registered: every aggregator says once which devices it speaks for."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

from carpool.errors import ContributionRejected, MalformedMessage, RoundFailed
from carpool.protocol import PoolHeader, Wire
from carpool_server.checkpoint import Population
from carpool_server.exchange import DESCRIBE, Exchange
from carpool_server.gather import Owners

_POLL_SECONDS = 0.1


def register(
    exchange: Exchange, *, aggregators: int, bundle_id: str, layout_id: str, seconds: float
) -> tuple[Owners, str | None]:
    """Waits for the aggregators and asks each for its devices.

    Args:
        exchange: to them.
        aggregators: how many must be there: a population is complete or it is another one.
        bundle_id: what each must have installed.
        layout_id: likewise.
        seconds: for all of it.

    Returns:
        Who speaks for which device, and the data set's id that all agree on.

    Raises:
        RoundFailed: an aggregator or its answer is missing after ``seconds``.
        ContributionRejected: an aggregator has another bundle, layout or data set.
        RunStopped: the run was asked to stop.
    """
    end = time.monotonic() + seconds
    while len(node_ids := exchange.node_ids()) < aggregators and time.monotonic() < end:
        exchange.pause(_POLL_SECONDS)
    if len(node_ids) < aggregators:
        raise RoundFailed(
            f"before the first round: expected {aggregators} aggregators within {seconds:g} s, "
            f"got {len(node_ids)}."
        )
    for node_id in node_ids:
        exchange.ask(node_id, DESCRIBE, Wire(b"", b""), group="describe", ttl=seconds)
    pools: dict[int, PoolHeader] = {}
    failure = "no answer"
    while (reply := exchange.next_reply(timeout=end - time.monotonic())) is not None:
        if reply.wire is None:
            failure = f"aggregator {reply.node_id}: {reply.error}"
            continue
        try:
            pools[reply.node_id] = PoolHeader.from_wire(reply.wire)
        except MalformedMessage as error:
            failure = f"aggregator {reply.node_id}: {error}"
    exchange.abandon()
    if len(pools) < len(node_ids):
        raise RoundFailed(
            f"before the first round: expected {len(node_ids)} aggregators to say which devices "
            f"they speak for within {seconds:g} s, got {len(pools)}; {failure}"
        )
    _check_pools(pools, bundle_id=bundle_id, layout_id=layout_id)
    return _owners(pools), next(iter(pools.values())).data_id


def identify(device_ids: Iterable[str]) -> Population:
    """A population's size and the digest of its names."""
    names = sorted(device_ids)
    digest = hashlib.sha256()
    for name in names:
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return Population(size=len(names), digest=digest.hexdigest())


def _check_pools(pools: Mapping[int, PoolHeader], *, bundle_id: str, layout_id: str) -> None:
    data_id = pools[min(pools)].data_id
    for node_id, pool in sorted(pools.items()):
        for name, expected, found in (
            ("bundle", bundle_id, pool.bundle_id),
            ("layout", layout_id, pool.layout_id),
            ("data set", data_id, pool.data_id),
        ):
            if found != expected:
                raise ContributionRejected(
                    f"expected the {name} {expected}, got {found}.", sender=str(node_id)
                )


def _owners(pools: Mapping[int, PoolHeader]) -> Owners:
    owners: dict[str, list[int]] = defaultdict(list)
    for node_id, pool in sorted(pools.items()):
        for device in set(pool.device_ids):
            owners[device].append(node_id)
    return {device: tuple(nodes) for device, nodes in owners.items()}

"""An aggregator that trains its devices in its own process: Flower's ``ClientApp``.

Everything that is costly is loaded once per process and shared by all devices and messages:
Ray's workers serve any aggregator, in any order.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from carpool.bundle import Bundle
from carpool.data.corpus import Example
from carpool.data.dataset import DOCUMENTS_NAME, EXAMPLES_NAME, SPLIT_NAME, Dataset
from carpool.errors import ConfigError, DeviceError, PrivacyError, UpdateRejected
from carpool.files import sha256_of_file
from carpool.protocol import Contribution, PoolHeader, RoundTask
from carpool.schema import canonical_id
from carpool_device.evaluation import METRICS, prepare_queries, rank_queries
from carpool_device.example_budget import ExampleBudget
from carpool_device.runtime import DeviceProgram, use_threads
from carpool_device.training import LocalUpdate, train_locally
from carpool_server.aggregation import ContributionBuilder, DeviceFacts
from carpool_server.exchange import from_record, to_record
from carpool_sim.spread import spread

_log = logging.getLogger(__name__)

LocalTraining = Callable[..., LocalUpdate]
"""Called as ``train_locally``: what devices do, or, where an attack is simulated, what some do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Where an aggregator finds what it needs, on its own machine.

    Attributes:
        bundle: the bundle's folder.
        data: the data set's folder; its training clients are the devices.
        threads: how many the runtime may use in an aggregator's process, or None for one per
            core. Processes that share a machine and take all cores each wait for each other.
    """

    bundle: str
    data: str
    threads: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Farm:
    """A process's devices: the program they share, and each one's examples."""

    bundle: Bundle
    program: DeviceProgram
    data_id: str
    examples: dict[str, list[Example]]


def data_id_of(folder: Path) -> str:
    """SHA-256 over the hashes of a data set's three files: another split is another data set."""
    names = (DOCUMENTS_NAME, EXAMPLES_NAME, SPLIT_NAME)
    return canonical_id({name: sha256_of_file(folder / name) for name in names})


@functools.cache
def farm(sources: Sources) -> Farm:
    """Loads program and examples, once per process.

    Raises:
        BundleError, CorpusError, DeviceError: what was found cannot be used.
    """
    bundle, data = Bundle.open(Path(sources.bundle)), Path(sources.data)
    # a process that has used a program keeps its threads: Ray's workers are fresh ones
    if sources.threads is not None and not DeviceProgram.any_used:
        use_threads(sources.threads)
    return Farm(
        bundle=bundle,
        program=DeviceProgram.load(bundle),
        data_id=data_id_of(data),
        examples=Dataset.open(data).part("train"),
    )


def make_client_app(
    sources: Sources | None = None, *, train: LocalTraining = train_locally
) -> ClientApp:
    """The aggregator's app.

    Args:
        sources: where to find bundle and data; None reads them from the Flower run's config
            (keys ``bundle`` and ``data``), as an uploaded app must.
        train: what devices do; a function of a module that Ray's workers can import.
    """
    app = ClientApp()
    # Functions of this module and plain values: what Ray sends to its workers stays small.
    app.query("describe")(functools.partial(_describe, sources))
    app.train()(functools.partial(_train, sources, train))
    return app


def contribute(
    task: RoundTask,
    devices: Farm,
    *,
    device_ids: frozenset[str],
    train: LocalTraining = train_locally,
) -> Contribution:
    """Trains the devices that the task asks for and adds up their clipped updates.

    A device that cannot train is refused with its reason, and the others go on; in mode
    ``none`` the whole message goes to this side's log.

    Args:
        task: what is asked.
        devices: who may be asked.
        device_ids: those of ``devices`` that this aggregator speaks for.
        train: what they do.

    Raises:
        DeviceError: the task is for another bundle or layout.
        ThetaError: its theta does not fit.
    """
    header, manifest = task.header, devices.bundle.manifest
    for name, expected, found in (
        ("bundle", devices.bundle.id, header.bundle_id),
        ("layout", manifest.layout_id, header.layout_id),
    ):
        if found != expected:
            raise DeviceError(f"expected a task for {name} {expected}, got one for {found}.")
    manifest.layout.check(task.theta, source="the task's theta")
    builder = ContributionBuilder(header, num_values=task.theta.size)
    own = [device for device in header.device_ids if device in device_ids]
    for device in set(header.device_ids).difference(own):
        builder.refuse(device, "not-spoken-for")
    # all before any training: going from one method of a program to the other takes time
    hits = _hits_at_1(task, devices, own) if header.metrics is not None else {}
    for device in own:
        try:
            local = _trained(task, devices, device, train=train)
            facts = DeviceFacts(
                num_examples=local.num_examples or 0,
                mean_loss=math.nan if local.mean_loss is None else local.mean_loss,
                hit_at_1=hits.get(device, math.nan),
            )
            builder.add(device, local.update, facts)
        except (DeviceError, UpdateRejected) as error:
            if header.report_loss:  # in a private mode nobody is told who is in a cohort
                _log.warning("round %d: %s", header.round_number, error)
            builder.refuse(device, error.reason)
    return builder.build()


def _trained(task: RoundTask, devices: Farm, device: str, *, train: LocalTraining) -> LocalUpdate:
    """One device's training; in mode ``example_level`` with what it spent in earlier rounds.

    A phone keeps its own books. Here workers keep nothing, so the task brings the number of the
    device's participations, and the same examples and recipe make the same books of it.

    Raises:
        DeviceError: the device cannot train, or may not any more.
    """
    header, examples = task.header, devices.examples[device]
    budget = None
    if header.recipe.example_privacy is not None:
        try:
            budget = ExampleBudget.after(
                (header.participations or {}).get(device, 0),
                num_examples=len(examples),
                layout=devices.bundle.manifest.layout,
                recipe=header.recipe,
            )
        except PrivacyError as error:
            raise DeviceError(f"device {device}: {error}", reason="privacy-budget-spent") from error
    return train(
        devices.program,
        examples,
        theta=task.theta,
        recipe=header.recipe,
        order_key=bytes.fromhex(header.order_key),
        device_id=device,
        round_number=header.round_number,
        budget=budget,
    )


def _hits_at_1(task: RoundTask, devices: Farm, own: Sequence[str]) -> dict[str, float]:
    """Each device's share of its own examples that the theta it was sent ranks first."""
    known = devices.program.document_index
    examples = {d: [e for e in devices.examples[d] if e.document in known] for d in own}
    if not any(examples.values()):
        return {}
    queries = prepare_queries(devices.program.tokenizer, known, examples)
    ranking = rank_queries(devices.program, task.theta, queries)
    hits = np.bincount(ranking.client, weights=METRICS["acc@1"](ranking.ranks))
    return dict(zip(ranking.clients, hits / np.bincount(ranking.client), strict=True))


def _describe(sources: Sources | None, message: Message, context: Context) -> Message:
    devices = farm(_sources(sources, context))
    pool = PoolHeader(
        bundle_id=devices.bundle.id,
        layout_id=devices.bundle.manifest.layout_id,
        data_id=devices.data_id,
        device_ids=tuple(_own_devices(devices, context)),
    )
    return Message(to_record(pool.to_wire()), reply_to=message)


def _train(
    sources: Sources | None, train: LocalTraining, message: Message, context: Context
) -> Message:
    devices = farm(_sources(sources, context))
    task = RoundTask.from_wire(from_record(message.content))
    own = frozenset(_own_devices(devices, context))
    contribution = contribute(task, devices, device_ids=own, train=train)
    return Message(to_record(contribution.to_wire()), reply_to=message)


def _own_devices(devices: Farm, context: Context) -> list[str]:
    """This node's share of the data set's training clients."""
    part, parts = (int(context.node_config[f]) for f in ("partition-id", "num-partitions"))
    sizes = {device: len(examples) for device, examples in devices.examples.items()}
    return spread(sizes, parts=parts)[part]


def _sources(sources: Sources | None, context: Context) -> Sources:
    if sources is not None:
        return sources
    bundle, data = (str(context.run_config.get(name, "")) for name in ("bundle", "data"))
    if not bundle or not data:
        raise ConfigError(
            "expected the run config's bundle and data to be folders, got "
            f"bundle={bundle!r}, data={data!r}. Give them with --run-config."
        )
    return Sources(bundle=bundle, data=data)

"""An aggregator that trains its devices in its own process: Flower's ``ClientApp``.

Everything that is costly is loaded once per process and shared by all devices and messages:
Ray's workers serve any aggregator, in any order.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from carpool.bundle import Bundle
from carpool.data.corpus import Example
from carpool.data.dataset import DOCUMENTS_NAME, EXAMPLES_NAME, SPLIT_NAME, Dataset
from carpool.errors import ConfigError, DeviceError, Refusal, UpdateRejected
from carpool.files import sha256_of_file
from carpool.protocol import Contribution, ContributionHeader, PoolHeader, RoundTask
from carpool.schema import canonical_id
from carpool_device.runtime import DeviceProgram, use_threads
from carpool_device.training import train_locally
from carpool_server.aggregation import Total, clip_to_grid
from carpool_server.exchange import from_record, to_record
from carpool_sim.spread import spread

_log = logging.getLogger(__name__)


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


def make_client_app(sources: Sources | None = None) -> ClientApp:
    """The aggregator's app.

    Args:
        sources: where to find bundle and data; None reads them from the Flower run's config
            (keys ``bundle`` and ``data``), as an uploaded app must.
    """
    app = ClientApp()
    # Functions of this module and plain values: what Ray sends to its workers stays small.
    app.query("describe")(functools.partial(_describe, sources))
    app.train()(functools.partial(_train, sources))
    return app


def contribute(task: RoundTask, devices: Farm, *, device_ids: frozenset[str]) -> Contribution:
    """Trains the devices that the task asks for and adds up their clipped updates.

    A device that cannot train is refused with its reason, and the others go on; in mode
    ``none`` the whole message goes to this side's log.

    Args:
        task: what is asked.
        devices: who may be asked.
        device_ids: those of ``devices`` that this aggregator speaks for.

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
    total = Total(num_values=task.theta.size, capacity=len(header.device_ids))
    refused: dict[str, Refusal] = {}
    num_examples, loss_sum = 0, 0.0
    for device_id in header.device_ids:
        if device_id not in device_ids:
            refused[device_id] = "not-spoken-for"
            continue
        try:
            local = train_locally(
                devices.program,
                devices.examples[device_id],
                theta=task.theta,
                recipe=header.recipe,
                order_key=bytes.fromhex(header.order_key),
                device_id=device_id,
                round_number=header.round_number,
            )
            clipped = clip_to_grid(local.update, clip_norm=header.clip_norm, device_id=device_id)
        except (DeviceError, UpdateRejected) as error:
            if header.report_loss:  # in a private mode nobody is told who is in a cohort
                _log.warning("round %d: %s", header.round_number, error)
            refused[device_id] = error.reason
            continue
        total.add(clipped, count=1)
        num_examples += local.num_examples
        loss_sum += local.mean_loss
    return Contribution(
        header=ContributionHeader(
            run_id=header.run_id,
            round_number=header.round_number,
            bundle_id=header.bundle_id,
            layout_id=header.layout_id,
            device_ids=tuple(i for i in header.device_ids if i not in refused),
            count=total.count,
            refused=refused,
            num_examples=num_examples if header.report_loss else None,
            loss_sum=loss_sum if header.report_loss else None,
        ),
        total=total.values,
    )


def _describe(sources: Sources | None, message: Message, context: Context) -> Message:
    devices = farm(_sources(sources, context))
    pool = PoolHeader(
        bundle_id=devices.bundle.id,
        layout_id=devices.bundle.manifest.layout_id,
        data_id=devices.data_id,
        device_ids=tuple(_own_devices(devices, context)),
    )
    return Message(to_record(pool.to_wire()), reply_to=message)


def _train(sources: Sources | None, message: Message, context: Context) -> Message:
    devices = farm(_sources(sources, context))
    task = RoundTask.from_wire(from_record(message.content))
    own = frozenset(_own_devices(devices, context))
    contribution = contribute(task, devices, device_ids=own)
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

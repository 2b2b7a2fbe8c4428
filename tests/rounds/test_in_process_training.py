"""The real aggregator app over a tiny real program, on an in-process grid."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from real_devices import run_apps
from round_kit import Witness, settings
from tiny_data import BROKEN

from carpool.bundle import Bundle
from carpool.errors import DeviceError, ThetaError
from carpool.protocol import RoundTask, TaskHeader, Wire
from carpool.recipe import LocalRecipe
from carpool.theta import read_theta, zero_theta
from carpool_device.training import LocalUpdate, train_locally
from carpool_server.exchange import DESCRIBE, to_record
from carpool_server.flower import make_server_app
from carpool_server.in_process import LocalGrid, app_nodes
from carpool_server.privacy.clipping import clip_to_grid
from carpool_sim.aggregator import Farm, Sources, contribute, data_id_of, farm, make_client_app
from carpool_sim.spread import spread


@pytest.fixture
def devices(sources: Sources) -> Farm:
    return farm(sources)


def task_for(devices: Farm, device_ids: tuple[str, ...], **changes: object) -> RoundTask:
    manifest = devices.bundle.manifest
    header = TaskHeader(
        run_id="r",
        round_number=1,
        bundle_id=devices.bundle.id,
        layout_id=manifest.layout_id,
        recipe=LocalRecipe(learning_rate=0.05, epochs=1, batch_size=4),
        order_key="abcd",
        clip_norm=0.5,
        device_ids=device_ids,
        report_loss=True,
        norm_bit=False,
        metrics=None,
        participations=None,
    )
    return RoundTask(header=header.model_copy(update=changes), theta=zero_theta(manifest.layout))


def everybody(devices: Farm) -> tuple[str, ...]:
    return tuple(sorted(devices.examples))


def test_a_contribution_is_the_sum_of_its_devices_clipped_updates(devices: Farm) -> None:
    """Each device trained alone, clipped and added with Python's integers."""
    ids = tuple(i for i in everybody(devices) if i != BROKEN)
    task = task_for(devices, ids)
    found = contribute(task, devices, device_ids=frozenset(ids))
    expected = [0] * task.theta.size
    for device in ids:
        local = train_locally(
            devices.program,
            devices.examples[device],
            theta=task.theta,
            recipe=task.header.recipe,
            order_key=bytes.fromhex("abcd"),
            device_id=device,
            round_number=1,
        )
        grid = clip_to_grid(local.update, clip_norm=0.5, device_id=device)
        expected = [a + b for a, b in zip(expected, grid.tolist(), strict=True)]
    assert found.total.tolist() == expected
    assert any(expected)
    assert (found.header.count, found.header.device_ids) == (len(ids), ids)
    assert found.header.loss_sum is not None
    assert found.header.num_examples == sum(len(devices.examples[i]) for i in ids)


def test_a_device_that_cannot_train_is_refused_and_the_others_go_on(
    devices: Farm, caplog: pytest.LogCaptureFixture
) -> None:
    """Its log names device, example and document; the coordinator is told a word."""
    found = contribute(
        task_for(devices, everybody(devices)), devices, device_ids=frozenset(devices.examples)
    )
    assert found.header.refused == {BROKEN: "unknown-document"}
    assert b"d-unknown" not in found.to_wire().header
    (message,) = caplog.messages
    assert message == (
        "round 1: device client-broken: example 1 of 1: unknown document id 'd-unknown'; expected "
        f"one of the 5 documents of bundle {devices.bundle.id[:12]}."
    )
    assert found.header.count == len(devices.examples) - 1


def test_in_a_private_mode_no_device_is_named_in_the_log(
    devices: Farm, caplog: pytest.LogCaptureFixture
) -> None:
    """Who is in a cohort is secret, and Ray keeps its workers' logs in files."""
    task = task_for(devices, everybody(devices), report_loss=False)
    found = contribute(task, devices, device_ids=frozenset(devices.examples))
    assert found.header.refused == {BROKEN: "unknown-document"}
    assert not caplog.messages


def test_a_device_whose_update_is_not_finite_is_refused(devices: Farm) -> None:
    """It poisons nobody's sum."""
    first, second, *_ = everybody(devices)

    def train(*arguments: object, device_id: str, **options: object) -> LocalUpdate:
        local = train_locally(*arguments, device_id=device_id, **options)
        if device_id == first:
            local.update[3] = np.nan
        return local

    ids = frozenset(devices.examples)
    found = contribute(task_for(devices, (first, second)), devices, device_ids=ids, train=train)
    alone = contribute(task_for(devices, (second,)), devices, device_ids=ids)
    assert found.header.refused == {first: "not-finite"}
    np.testing.assert_array_equal(found.total, alone.total)


def test_a_device_of_another_aggregator_is_refused(devices: Farm) -> None:
    """An aggregator answers for its own devices alone."""
    first, second, *_ = everybody(devices)
    found = contribute(task_for(devices, (first, second)), devices, device_ids=frozenset({first}))
    assert found.header.refused == {second: "not-spoken-for"}


def test_the_loss_is_told_only_where_it_is_asked_for(devices: Farm) -> None:
    """In a private mode no exact number about text leaves the aggregator."""
    task = task_for(devices, everybody(devices)[:3], report_loss=False)
    found = contribute(task, devices, device_ids=frozenset(devices.examples))
    assert (found.header.loss_sum, found.header.num_examples) == (None, None)


@pytest.mark.parametrize("field", ["bundle", "layout"])
def test_a_task_for_another_bundle_or_layout_is_refused(devices: Farm, field: str) -> None:
    """With both ids."""
    task = task_for(devices, everybody(devices)[:1], **{f"{field}_id": "9" * 64})
    own = {"bundle": devices.bundle.id, "layout": devices.bundle.manifest.layout_id}[field]
    with pytest.raises(DeviceError) as caught:
        contribute(task, devices, device_ids=frozenset(devices.examples))
    assert str(caught.value) == f"expected a task for {field} {own}, got one for {'9' * 64}."


def test_a_task_with_a_short_theta_is_refused_whole(devices: Farm) -> None:
    """It is nobody's device's fault."""
    task = task_for(devices, everybody(devices)[:1])
    short = RoundTask(header=task.header, theta=task.theta[:-1])
    with pytest.raises(ThetaError, match=r"^the task's theta: expected float32 values of shape"):
        contribute(short, devices, device_ids=frozenset(devices.examples))


def test_real_training_over_1_2_and_5_aggregators_gives_one_theta(
    sources: Sources, tmp_path: Path
) -> None:
    """The same theta, bit for bit, and it has learned something."""
    config = settings(rounds=4)
    results, witnesses = [], []
    for parts in (1, 2, 5):
        witness = Witness()
        witnesses.append(witness)
        results.append(
            run_apps(sources, tmp_path / str(parts), config, parts=parts, witness=witness)
        )
    assert len({result.theta.tobytes() for result in results}) == 1
    for witness in witnesses[1:]:
        for number, total in witness.sums.items():
            np.testing.assert_array_equal(total, witnesses[0].sums[number])
    losses = [record.mean_loss for record in results[0].info.history]
    assert losses[-1] < losses[0]
    refused = [record.refused for record in results[0].info.history]
    assert max(r for r in refused if r is not None) == 1  # the broken client, when it was drawn


def test_the_uploaded_apps_run_from_a_run_config(sources: Sources, tmp_path: Path) -> None:
    """Flower's two modules do what the simulation does, with folders from the run's config."""
    from carpool_flower import client_app, server_app  # noqa: PLC0415  as Flower imports them

    text = """
        rounds = 2
        seed = 5
        privacy = {mode = "none", clip_norm = 0.5}
        cohort = {expected_size = 12.0, deadline_seconds = 30.0}
        local = {learning_rate = 0.05, epochs = 1, batch_size = 4}
        server = {kind = "sgd", learning_rate = 1.0}
        simulation = {aggregators = 2}
    """
    (tmp_path / "settings.toml").write_text(text)
    run_config = {
        "bundle": sources.bundle,
        "data": sources.data,
        "out": str(tmp_path / "run"),
        "settings": str(tmp_path / "settings.toml"),
        "resume": False,
    }
    context = Context(
        run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config
    )
    grid = LocalGrid(app_nodes(client_app.app, parts=2, run_config=run_config))
    server_app.app(grid, context)
    bundle = Bundle.open(Path(sources.bundle))
    theta = read_theta(
        tmp_path / "run" / "theta-round-0002.safetensors",
        layout=bundle.manifest.layout,
        bundle_id=bundle.id,
    )
    assert theta.any()


def test_an_uploaded_app_without_its_folders_says_which() -> None:
    """Before anything else."""
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(Exception, match=r"expected the run config's bundle, out, settings"):
        make_server_app()(LocalGrid({}), context)
    given = {"bundle": "b", "out": "o", "settings": "s", "resume": "false"}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=given)
    with pytest.raises(Exception, match=r"resume to be true or false, got 'false'"):
        make_server_app()(LocalGrid({}), context)
    (node,) = app_nodes(make_client_app(), parts=1).values()

    message = Message(
        to_record(Wire(b"", b"")), dst_node_id=100, message_type=DESCRIBE, group_id="x"
    )
    with pytest.raises(Exception, match=r"expected the run config's bundle and data to be folders"):
        node(message)


def test_a_data_set_has_an_id_of_its_files(tiny_data_path: Path, tmp_path: Path) -> None:
    """Another split is another data set."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_data_path, copy)
    assert data_id_of(copy) == data_id_of(tiny_data_path)
    split = copy / "split.json"
    split.write_text(split.read_text().replace('"seed": ', '"seed":  '))
    assert data_id_of(copy) != data_id_of(tiny_data_path)


def test_devices_are_spread_evenly_whatever_their_order() -> None:
    """Each device in one part; loads within the largest device of each other."""
    sizes = {f"d{n}": 1 + (n * 7) % 13 for n in range(40)}
    parts = spread(sizes, parts=5)
    assert parts == spread(dict(reversed(sizes.items())), parts=5)
    assert sorted(device for part in parts for device in part) == sorted(sizes)
    loads = [sum(sizes[device] for device in part) for part in parts]
    assert max(loads) - min(loads) <= 2
    assert spread({"a": 1}, parts=3) == [["a"], [], []]

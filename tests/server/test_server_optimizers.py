"""Server optimisers against PyTorch's, which are somebody else's code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from carpool.config import AdamConfig, SgdConfig
from carpool_server.optimizers import make_optimizer, rate_at

COUNT, STEPS = 50, 30


@pytest.fixture
def means() -> np.ndarray:
    return np.random.default_rng(4).normal(0, 0.1, (STEPS, COUNT))


def ours(config: SgdConfig | AdamConfig, means: np.ndarray, rates: list[float]) -> np.ndarray:
    optimizer = make_optimizer(config)
    theta, state = np.zeros(COUNT, dtype=np.float32), optimizer.init(COUNT)
    for mean, rate in zip(means, rates, strict=True):
        theta, state = optimizer.step(theta, mean, state, rate=rate)
    assert theta.dtype == np.float32
    assert {values.dtype for values in state.values()} == {np.dtype(np.float64)}
    return theta


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_momentum_is_pytorchs(means: np.ndarray, momentum: float) -> None:
    """torch.optim.SGD in float64 on the negative mean; theta is off by its float32 roundings."""
    config = SgdConfig(learning_rate=0.3, momentum=momentum)
    parameter = torch.zeros(COUNT, dtype=torch.float64)
    optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=momentum)
    for mean in means:
        parameter.grad = -torch.from_numpy(mean)
        optimizer.step()
    np.testing.assert_allclose(ours(config, means, [0.3] * STEPS), parameter.numpy(), atol=1e-5)


def test_adam_is_pytorchs_with_its_bias_correction_undone(means: np.ndarray) -> None:
    """torch.optim.Adam with rate and epsilon rescaled every step, and tau**2 to start from."""
    config = AdamConfig(learning_rate=0.03, beta1=0.9, beta2=0.99, tau=1e-3)
    parameter = torch.zeros(COUNT, dtype=torch.float64)
    optimizer = torch.optim.Adam([parameter], betas=(0.9, 0.99))
    optimizer.state[parameter] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.full_like(parameter, config.tau**2),
    }
    for number, mean in enumerate(means, start=1):
        correction = math.sqrt(1 - 0.99**number)
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - 0.9**number) / correction
        optimizer.param_groups[0]["eps"] = config.tau / correction
        parameter.grad = -torch.from_numpy(mean)
        optimizer.step()
    found = ours(config, means, [0.03] * STEPS)
    np.testing.assert_allclose(found, parameter.numpy(), atol=1e-6)
    assert np.abs(found).max() > 0.05


def test_plain_averaging_is_a_rate_of_one_and_no_momentum(means: np.ndarray) -> None:
    """FedAvg: theta moves by the mean update."""
    found = ours(SgdConfig(learning_rate=1.0), means[:1], [1.0])
    np.testing.assert_array_equal(found, means[0].astype(np.float32))


def test_a_step_changes_none_of_its_arguments(means: np.ndarray) -> None:
    """A round that is done again starts from the same state."""
    optimizer = make_optimizer(AdamConfig(learning_rate=0.1))
    theta, state = np.zeros(COUNT, dtype=np.float32), optimizer.init(COUNT)
    before = {name: values.copy() for name, values in state.items()}
    optimizer.step(theta, means[0], state, rate=0.1)
    assert not theta.any()
    for name, values in before.items():
        np.testing.assert_array_equal(state[name], values)


def test_the_rate_is_held_and_then_falls_in_equal_parts() -> None:
    """10 rounds, half held: five full ones, then 5/6 down to 1/6, and 0 only after the end."""
    config = SgdConfig(learning_rate=6.0, hold=0.5)
    rates = [rate_at(number, rounds=10, config=config) for number in range(1, 11)]
    assert rates == pytest.approx([6, 6, 6, 6, 6, 5, 4, 3, 2, 1])


@pytest.mark.parametrize(("hold", "expected"), [(1.0, [2, 2, 2, 2]), (0.0, [1.6, 1.2, 0.8, 0.4])])
def test_hold_all_and_hold_none(hold: float, expected: list[float]) -> None:
    """The ends of the range."""
    config = SgdConfig(learning_rate=2.0, hold=hold)
    rates = [rate_at(number, rounds=4, config=config) for number in range(1, 5)]
    assert rates == pytest.approx(expected)

"""Epsilon of many releases, in the two regimes in which one can be stated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from carpool.errors import PrivacyError
from carpool_server.privacy.accounting import gaussian, pld, prv, rdp
from carpool_server.privacy.accounting.releases import (
    Epsilon,
    Group,
    Method,
    Release,
    check_delta,
    grouped,
)
from carpool_server.privacy.accounting.sampler import Slack, with_slack


def epsilon_of(releases: Iterable[Release], *, delta: float, method: Method = "prv") -> Epsilon:
    """Epsilon of all the releases together, where the server samples (regime "poisson").

    Guarantees: whoever sees the sequence of releases, each of which may depend on those before,
    sees an (epsilon, delta)-differentially private function of the clients' data. Neighbouring:
    add or remove one client (all of its data, over all releases). It holds if the server draws
    every registered client independently with the release's sampling rate, secretly, and one
    client moves the sum by at most the clip. Slack: the accountant's own (its module states it)
    and the noise sampler's (``sampler.with_slack``) are in the value.

    Args:
        releases: in any order; none cost 0.
        delta: in (0, 1).
        method: ``"prv"``, ``"rdp"`` and ``"pld"`` take any sampling rate, ``"gaussian"`` 1 only.

    Raises:
        PrivacyError: a delta out of range, or an epsilon that the method cannot state.

    Source: the methods' modules.
    """
    known = list(releases)
    return Epsilon(
        value=_epsilon(known, Slack.of(known), delta=delta, method=method),
        delta=delta,
        method=method,
        regime="poisson",
    )


def epsilon_at_cap(
    releases: Iterable[Release],
    *,
    delta: float,
    max_participations: int,
    method: Method = "gaussian",
) -> Epsilon:
    """Epsilon for a client that is in at most so many of the releases, whichever they are.

    Guarantees: (epsilon, delta)-differential privacy of the sequence of releases for every
    client that the cap is held for, also where clients choose when to take part, and where that
    depends on earlier releases: the cap is a privacy filter on the individual, so its loss is
    that of ``max_participations`` Gaussians, and the value is that of those with the least
    noise. Neighbouring: what one client adds to the sums becomes zero, its participations stay
    (that it took part is not hidden). No amplification is claimed: sampling rates are ignored.
    Slack: the accountant's and the noise sampler's, of as many releases, are in the value; a
    release that the client is not in is the same function of earlier ones for both neighbours.

    Args:
        releases: in any order; fewer than the cap count as they are, none cost 0.
        delta: in (0, 1).
        max_participations: the cap, 1 or more.
        method: any; ``"gaussian"`` is exact here.

    Raises:
        PrivacyError: a cap or delta out of range, or an epsilon that the method cannot state.

    Source: Feldman and Zrnic (2021), arXiv 2008.11193; for Gaussians with the closed form:
    Koskela, Tobaben and Honkela (2022), arXiv 2209.15596, Smith and Thakurta (2022), arXiv
    2210.17520.
    """
    if max_participations < 1:
        raise PrivacyError(f"participation cap: expected at least 1, got {max_participations}.")
    known = sorted(releases, key=lambda release: release.noise_multiplier)
    worst = [
        dataclasses.replace(release, sampling_rate=1.0) for release in known[:max_participations]
    ]
    slack = Slack.of(known, at_most=max_participations)
    return Epsilon(
        value=_epsilon(worst, slack, delta=delta, method=method),
        delta=delta,
        method=method,
        regime="participation-cap",
    )


def _accountant(method: Method) -> Callable[[Sequence[Group], float], float]:
    modules = {"prv": prv, "rdp": rdp, "pld": pld, "gaussian": gaussian}
    module = modules[method]
    return lambda groups, delta: module.epsilon(groups, delta=delta)


def _epsilon(releases: list[Release], slack: Slack, *, delta: float, method: Method) -> float:
    check_delta(delta)
    if not releases:
        return 0.0
    groups, accountant = grouped(releases), _accountant(method)
    return with_slack(lambda kept: accountant(groups, kept), delta=delta, slack=slack)

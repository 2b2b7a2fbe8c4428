"""Opacus's RDP accountant: looser than PRV, in milliseconds, at any epsilon."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from carpool_server.privacy.accounting.releases import Group

_MORE_ORDERS = (80, 96, 128, 192, 256, 512, 1024)
"""Beyond Opacus's own 63: what small epsilons take their bound from."""


def epsilon(groups: Sequence[Group], *, delta: float) -> float:
    """An upper bound on epsilon by Renyi divergences of some hundred orders.

    Guarantees: never below the true value (no discretisation: each order's bound is exact, and
    every order's bound holds). Neighbouring: add or remove one client.

    Args:
        groups: what is composed; at least one.
        delta: in (0, 1).

    Source: Mironov, Talwar and Zhang (2019), arXiv 1908.10530; conversion: Balle et al. (2020),
    arXiv 1905.09982.
    """
    from opacus.accountants import RDPAccountant  # noqa: PLC0415  takes seconds, brings torch

    accountant = RDPAccountant()
    accountant.history = [(g.noise_multiplier, g.sampling_rate, g.releases) for g in groups]
    orders = [*RDPAccountant.DEFAULT_ALPHAS, *_MORE_ORDERS]
    with warnings.catch_warnings():
        # that a larger order might be tighter takes nothing from the bound
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        return max(0.0, float(accountant.get_epsilon(delta, alphas=orders)))

"""Opacus's PRV accountant: numerical composition, with a stated error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from carpool.errors import PrivacyError
from carpool_server.privacy.accounting import rdp
from carpool_server.privacy.accounting.releases import Group

EPSILON_ERROR = 0.01
"""The accountant's own error bound; its upper end is what is reported."""

SMALLEST_EPSILON = 0.05
"""Targets near the accountant's own error cannot be searched for."""

LARGEST_EPSILON = 100.0
"""Beyond it the accountant's mesh takes gigabytes, and the promise means nothing."""


def epsilon(groups: Sequence[Group], *, delta: float) -> float:
    """An upper bound on epsilon of a composition of Poisson-subsampled Gaussians.

    Guarantees: by at most twice ``EPSILON_ERROR`` and a share of 1/1000 of delta above the true
    value. Neighbouring: add or remove one client.

    Args:
        groups: what is composed; at least one.
        delta: in (0, 1).

    Raises:
        PrivacyError: epsilon is above ``LARGEST_EPSILON`` (by the RDP bound), or the accountant
            cannot resolve this delta.

    Source: Gopi, Lee and Wutschitz (2021), arXiv 2106.02848.
    """
    bound = rdp.epsilon(groups, delta=delta)
    if not bound <= LARGEST_EPSILON:
        raise PrivacyError(
            f"epsilon: expected at most {LARGEST_EPSILON:g}, got up to {bound:.4g} at delta "
            f"{delta:g}: more than the accountant can compute and more than protects anybody. "
            "Raise the noise multiplier, or release less often."
        )
    from opacus.accountants import PRVAccountant  # noqa: PLC0415  takes seconds, brings torch

    accountant = PRVAccountant()
    accountant.history = [(g.noise_multiplier, g.sampling_rate, g.releases) for g in groups]
    try:
        with _quiet():
            return max(0.0, float(accountant.get_epsilon(delta, eps_error=EPSILON_ERROR)))
    except (ValueError, RuntimeError) as error:
        raise PrivacyError(
            f"delta {delta:g}: the PRV accountant cannot compute epsilon there: {error} "
            "Choose a larger delta."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus takes log(0) at q = 1 and finds a first domain by an RDP bound that warns."""
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        yield

"""dp-accounting's privacy loss distributions: a second opinion on PRV."""

from __future__ import annotations

from collections.abc import Sequence

from carpool_server.privacy.accounting.releases import Group


def epsilon(groups: Sequence[Group], *, delta: float) -> float:
    """An upper bound on epsilon by discretised privacy loss distributions.

    Guarantees: losses are rounded up to multiples of 1e-4 (the pessimistic estimate), so it is
    never below the true value. Neighbouring: add or remove one client, both directions.

    Args:
        groups: what is composed; at least one.
        delta: in (0, 1).

    Source: Koskela, Jalko and Honkela (2020), arXiv 1906.03049; Doroshenko et al. (2022), arXiv
    2207.04380.
    """
    from dp_accounting import dp_event  # noqa: PLC0415  only where it is asked for
    from dp_accounting.pld import PLDAccountant  # noqa: PLC0415

    accountant = PLDAccountant()
    for z, q, count in groups:
        event = dp_event.GaussianDpEvent(z)
        accountant.compose(event if q == 1 else dp_event.PoissonSampledDpEvent(q, event), count)
    return max(0.0, float(accountant.get_epsilon(delta)))

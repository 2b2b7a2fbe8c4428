"""What releases cost: epsilon of a composition, and the noise for a budget.

``releases`` says what a release is, ``composition`` computes epsilon of many, ``calibration``
finds the noise; one module per accountant (``prv``, ``rdp``, ``pld``, ``gaussian``), and
``sampler`` for what the noise's own approximation costs.
"""

from carpool_server.privacy.accounting.calibration import calibrate
from carpool_server.privacy.accounting.composition import epsilon_at_cap, epsilon_of
from carpool_server.privacy.accounting.prv import EPSILON_ERROR, SMALLEST_EPSILON
from carpool_server.privacy.accounting.releases import Epsilon, Method, Release, rounded_up

__all__ = [
    "EPSILON_ERROR",
    "SMALLEST_EPSILON",
    "Epsilon",
    "Method",
    "Release",
    "calibrate",
    "epsilon_at_cap",
    "epsilon_of",
    "rounded_up",
]

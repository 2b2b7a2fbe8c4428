"""The audit: how much a release tells about canaries, against what is stated.

``bounds`` turns right guesses into a lower bound on epsilon, ``canaries`` are the devices that
are guessed, ``guessing`` says how, ``audit`` runs them through the rounds of a run, and
``result`` tells what came of it.
"""

from carpool_server.privacy.audit.audit import audit_config, run_audit
from carpool_server.privacy.audit.bounds import (
    Guesses,
    epsilon_bound,
    gaussian_bound,
    p_value,
)
from carpool_server.privacy.audit.result import AuditResult

__all__ = [
    "AuditResult",
    "Guesses",
    "audit_config",
    "epsilon_bound",
    "gaussian_bound",
    "p_value",
    "run_audit",
]

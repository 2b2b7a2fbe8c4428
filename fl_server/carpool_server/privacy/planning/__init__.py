"""Before anything is trained: what a budget costs, and whether training can bear it.

``plan`` computes, ``evidence`` holds what was measured and the thresholds taken from it,
``advice`` says whether a plan is sensible, ``output`` and ``plot`` show it, ``command`` is
``carpool privacy plan``.
"""

from carpool_server.privacy.planning.advice import advice
from carpool_server.privacy.planning.plan import Plan, make_plan

__all__ = ["Plan", "advice", "make_plan"]

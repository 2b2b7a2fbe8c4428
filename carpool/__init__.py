"""carpool: train a retriever across phones without seeing their text.

This package is the contract that all sides share: bundle, theta, recipe, protocol and
configuration. It imports neither torch nor flwr.
"""

from importlib.metadata import version

__version__ = version("carpool")

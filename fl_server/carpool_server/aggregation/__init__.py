"""From devices' updates to one exact integer sum that nobody can push past its bound."""

from carpool_server.aggregation.contribution import ContributionBuilder, DeviceFacts
from carpool_server.aggregation.total import Total, blocks_of
from carpool_server.aggregation.validation import validate_contribution

__all__ = ["ContributionBuilder", "DeviceFacts", "Total", "blocks_of", "validate_contribution"]

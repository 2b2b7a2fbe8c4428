"""From devices' updates to one exact integer sum that nobody can push past its bound."""

from carpool_server.aggregation.grid import Total, clip_to_grid, grid_step
from carpool_server.aggregation.validation import validate_contribution

__all__ = ["Total", "clip_to_grid", "grid_step", "validate_contribution"]

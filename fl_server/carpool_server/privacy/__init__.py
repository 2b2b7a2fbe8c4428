"""What is promised about one client's data, and what that costs: noise and accounting."""

from carpool_server.privacy.accounting import epsilon_spent, noise_multiplier_for
from carpool_server.privacy.noise import gaussian_on_grid

__all__ = ["epsilon_spent", "gaussian_on_grid", "noise_multiplier_for"]

"""What joins the sides on one machine or a Ray cluster: rounds over simulated devices."""

import os

# Read when flwr and ray are imported, so they are set before any module here imports them:
# no telemetry, no look for updates, and no warning about a default that ray will change.
for _name, _value in (
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
    ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
):
    os.environ.setdefault(_name, _value)

"""How often Python looks for cycles of objects to free, while graphs are handled."""

RARELY = (50_000, 20, 50)
"""For ``gc.set_threshold``: graphs are made of cycles, and it walks all that live on."""

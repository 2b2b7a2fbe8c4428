"""The coordinator: rounds over Flower's ``Grid``, exact sums, one noise, durable releases.

Depends on ``carpool`` alone among the packages here: what a device computes is not its affair.
"""

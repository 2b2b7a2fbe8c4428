"""The aggregator, as Flower finds it."""

from carpool_sim.aggregator import make_client_app

app = make_client_app()

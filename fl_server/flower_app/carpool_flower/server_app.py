"""The coordinator, as Flower finds it."""

from carpool_server.flower import make_server_app

app = make_server_app()

"""The Flower app: two modules that name carpool's own apps."""

"""``carpool doctor``: what a program is, what it costs and what is wrong with it."""

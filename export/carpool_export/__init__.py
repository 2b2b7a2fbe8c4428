"""A small language model and a set of documents become the bundle that devices train."""

"""A device: runs a bundle with the plain ExecuTorch runtime, trains on its own text, searches."""

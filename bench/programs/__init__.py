"""The training step side by side: the bundle's program and every other way to take it.

All in one process, in turns, so that whatever slows the machine slows all. Before anything is
timed, every side's loss and gradient are compared with eager PyTorch in float64: what computes
another step is reported and not timed. ``python -m bench.programs run --help``.
"""

"""Which aggregator speaks for which devices. It changes who waits for whom and nothing else."""

from __future__ import annotations

from collections.abc import Mapping


def spread(sizes: Mapping[str, int], *, parts: int) -> list[list[str]]:
    """Deals devices out so that the parts have about equally many examples.

    Greedy, largest first, to the part with the fewest examples so far; ties go to the first.
    Equal arguments give equal parts, whatever the order of ``sizes``.

    Args:
        sizes: number of examples by device.
        parts: how many; more parts than devices leave some empty.

    Returns:
        The devices of each part, sorted.

    Source: Graham (1969), doi 10.1137/0117039: no part's load is above 4/3 of the best
    possible largest one.
    """
    dealt: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for device in sorted(sizes, key=lambda name: (-sizes[name], name)):
        part = min(range(parts), key=loads.__getitem__)
        dealt[part].append(device)
        loads[part] += sizes[device]
    return [sorted(part) for part in dealt]

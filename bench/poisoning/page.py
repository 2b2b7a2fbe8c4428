"""The table and the page, from what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from bench.poisoning.runs import Outcome, Plan
from carpool.machine import processor

HEADER = (
    "| preset | clip C | attack | colluders | in a round: mean, most | bound on their part of a "
    "round's mean | over an honest mean | target first, others' queries | acc@1 |\n"
    "|---|---:|---|---:|---:|---:|---:|---:|---:|"
)


def rows(outcomes: Sequence[Outcome]) -> list[str]:
    """The table's rows; an attack without its clean run has no differences."""
    clean = {_clean_key(o.plan): o for o in outcomes if o.plan.kind is None}
    return [_row(outcome, clean.get(_clean_key(outcome.plan))) for outcome in outcomes]


def _clean_key(plan: Plan) -> tuple[str, str, int, int]:
    return plan.preset, plan.clip, plan.rounds, plan.seed


def _row(outcome: Outcome, clean: Outcome | None) -> str:
    plan = outcome.plan
    drawn = [watched.colluders for watched in outcome.watched]
    promoted, accuracy = f"{outcome.promoted:.1%}", f"{outcome.accuracy:.3f}"
    share = ""
    if clean is not None and plan.kind is not None:
        share = f"{outcome.bound / clean.mean_length:.2f}"
        promoted += f" ({100 * (outcome.promoted - clean.promoted):+.1f} points)"
        accuracy += f" ({outcome.accuracy - clean.accuracy:+.3f})"
    cells = [
        f"`{plan.preset}`",
        f"{outcome.clip_norm:g} ({plan.clip})",
        plan.kind or "none",
        f"{plan.colluders} ({plan.colluders / outcome.population:.1%})" if plan.kind else "",
        f"{sum(drawn) / len(drawn):.2f}, {max(drawn)}" if plan.kind else "",
        f"{outcome.bound:.4f}" if plan.kind else "",
        share,
        promoted,
        accuracy,
    ]
    return f"| {' | '.join(cells)} |"


def page(outcomes: Sequence[Outcome], *, command: str) -> str:
    """The whole page.

    Args:
        outcomes: at least one.
        command: that made it.
    """
    first = outcomes[0]
    table = "\n".join([HEADER, *rows(outcomes)])
    return f"""# What colluding devices achieve

MITRE ATT&CK, all-MiniLM-L6-v2: {first.population} training clients, of whom some collude;
{first.plan.rounds} real rounds with a Poisson cohort of {first.expected_size:g} expected, seed
{first.plan.seed}, one run per row; measured on {first.queries:,} queries of {first.clients}
validation clients that were never trained on. `bench/poisoning/` makes it:

```
{command}
```

- **Promotion**: colluders label all of their queries with one document, the one that the fewest
  examples name (`{first.target}`: {first.target_clicks} of them). Success: others' queries that
  find it at the top.
- **Label flips**: colluders replace each label by the document half a catalogue further. Success:
  lost acc@1.
- Both multiply their update by a million: the clip leaves its direction and the length C.
- **Bound**: each colluder is in a round's sum at most once and at most C long, so together they are
  at most (colluders in the round) x C / {first.expected_size:g} of the round's mean, whatever they
  send; averaged over the rounds. **Over an honest mean**: that, divided by the length of a round's
  mean in the run without attackers, averaged over the rounds. In brackets: the difference to that
  run.
- Mode `none`: noise would blur both, and help only the defence. Only the clip differs between rows
  of a preset: that of the shipped `*-central` settings, and that of no privacy.

{table}

The bound is on the mean that enters the server optimiser. FedAdam divides by each coordinate's own
history, so a coordinate that only colluders push can still move by the optimiser's full rate: the
bound limits the attack's share of the mean, not its success.

{processor()}.
"""

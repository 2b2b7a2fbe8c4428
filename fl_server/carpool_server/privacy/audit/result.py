"""What an audit found, and how it is told."""

from __future__ import annotations

from carpool.schema import Model


class AuditResult(Model):
    """What an audit found.

    Attributes:
        epsilon: stated by the ledger for what was released, an upper bound.
        delta: of all epsilons here.
        method: how the ledger computed it, in words.
        confidence: of both bounds together.
        lower_bound: on epsilon, whatever the mechanism.
        gaussian_lower_bound: on epsilon, if the mechanism is a Gaussian one, as is claimed; only
            in regime ``participation-cap``, where the claim is no other.
        reach: what ``lower_bound`` would be had all guesses been right.
        canaries: each in or out by a fair coin.
        guesses, guesses_out: how many were guessed, and how many of these "out".
        correct: guesses that were right.
        rounds: released.
        sampling_rate: q of each round.
        noise_multiplier: z of a release, over all that is in it.
    """

    epsilon: float
    delta: float
    method: str
    confidence: float
    lower_bound: float
    gaussian_lower_bound: float | None
    reach: float
    canaries: int
    guesses: int
    guesses_out: int
    correct: int
    rounds: int
    sampling_rate: float
    noise_multiplier: float

    @property
    def largest_bound(self) -> float:
        """The larger of the bounds."""
        return max(self.lower_bound, self.gaussian_lower_bound or 0.0)

    @property
    def broken(self) -> bool:
        """Whether the stated epsilon is refuted."""
        return self.largest_bound > self.epsilon

    def rows(self) -> list[tuple[str, str]]:
        """What a table shows: names and values."""
        bound = (
            f"{self.lower_bound:.3f} (one-run audit, whatever the mechanism; all guesses right "
            f"would show {self.reach:.2f})"
        )
        gaussian = (
            "not computed: a sampled release is no Gaussian one"
            if self.gaussian_lower_bound is None
            else f"{self.gaussian_lower_bound:.3f} (one-run audit, if all is one Gaussian "
            "release, as is claimed)"
        )
        guessed = (
            f"{self.correct} of {self.guesses} ({self.guesses - self.guesses_out} in, "
            f"{self.guesses_out} out)"
        )
        rounds = (
            f"{self.rounds}, sampling rate {self.sampling_rate:.4g}, noise multiplier "
            f"{self.noise_multiplier:.4g}"
        )
        return [
            ("stated epsilon", f"{self.epsilon:.3f} at delta {self.delta:g} ({self.method})"),
            (f"lower bound, confidence {self.confidence:g}", bound),
            ("lower bound, Gaussian", gaussian),
            ("guessed rightly", guessed),
            ("canaries", f"{self.canaries}, each in or out by a fair coin"),
            ("rounds", rounds),
        ]

    def sentence(self) -> str:
        """What it means."""
        shown = (
            f"what was released shows at least {self.largest_bound:.3f}, with confidence "
            f"{self.confidence:g}"
        )
        if self.broken:
            return f"The stated epsilon of {self.epsilon:.3f} is broken: {shown}."
        return (
            f"The stated epsilon of {self.epsilon:.3f} is not refuted: {shown}. That proves "
            "nothing: a fault that this audit does not see stays."
        )

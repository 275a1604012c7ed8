"""What a run is found to have done: forgotten or not, kept or damaged, by measurements alone. Standard library only."""

from dataclasses import dataclass
from typing import Literal

from distributed_unlearn.records.result import SurvivingUpdate

SURVIVAL_LEVEL = 0.9
"""Share of the update below which the saved dtype counts as having undone part of the unlearning."""

Forgetting = Literal["forgotten", "partly forgotten", "not forgotten", "nothing to forget"]
"""How a set of records stands against records that were never trained on; see `rounds.verdict.judge_forgetting`."""
UNKNOWN: tuple[Forgetting, ...] = ("forgotten", "nothing to forget")
"""The model knows the set no better than unseen records; of the second it never did, as far as was measured."""
Retention = Literal["kept", "damaged"]
"""How the retain set stands against the start of the job; see `rounds.verdict.judge_retention`."""


@dataclass(frozen=True)
class MeasureEvidence:
    """One measure of difficulty of a forget set against the holdout set; 0 is fully known. Means are over records."""

    mean: float
    holdout_mean: float
    """Each record as hard as at the start of the job or now, whichever is easier."""
    start_mean: float | None
    """At the start of the job; None for what earlier jobs erased, whose state when it was known nobody here saw."""
    gap_closed: float | None
    """Share of the way from known to unseen that was gone; None where there was no way to go."""
    share_easier: float
    """P(a forget record is easier than a holdout record) + P(equal) / 2: 0.5 is indistinguishable, 1 fully known."""
    p_easier: float
    """One-sided Mann-Whitney test that the forget records are no easier."""
    num_known: int
    """Forget records that are easier than the easiest twentieth of the holdout."""
    p_known: float
    """Precedence test that they are no more than chance."""


@dataclass(frozen=True)
class ForgetVerdict:
    """One set that was to be forgotten, by this round, an earlier one or an earlier job."""

    set_name: str
    """`forget`, `forget_round_<k>` or `erased_before_<k>`, k from 1."""
    outcome: Forgetting
    num_records: int
    num_holdout_records: int
    harder_than_holdout: bool
    """Forgotten beyond what an unseen record is: whoever has the model can tell that it was erased."""
    loss: MeasureEvidence
    """Of each record's mean answer loss, nats per token."""
    missed: MeasureEvidence
    """Of the share of each record's answer tokens that the model does not predict: 1 - memorised."""

    @property
    def num_known(self) -> int:
        """Records that are still easier than unseen ones, by the worse of both measures."""
        return max(self.loss.num_known, self.missed.num_known)


@dataclass(frozen=True)
class RetainVerdict:
    """The retain set against the start of the job, not of the last round: damage adds up."""

    outcome: Retention
    num_records: int
    loss_rise_nats_per_token: float
    memorised_drop: float


@dataclass(frozen=True)
class Verdict:
    """How all sets stand at the end of a round; that of the last round is the run's."""

    forget: ForgetVerdict | None
    """None: not measured, the job has no holdout set."""
    retain: RetainVerdict
    earlier: tuple[ForgetVerdict, ...] = ()
    """What earlier rounds and earlier jobs erased."""

    @property
    def is_good(self) -> bool:
        """Forgetting was measured, everything is forgotten, and the retain set is kept."""
        forgotten = self.forget is not None and self.forget.outcome == "forgotten"
        still = all(found.outcome in UNKNOWN for found in self.earlier)
        return forgotten and still and self.retain.outcome == "kept"

    @property
    def words(self) -> str:
        """The verdict in a few words."""
        found: list[str] = ["forgetting not measured" if self.forget is None else self.forget.outcome]
        found.append(f"retain set {self.retain.outcome}")
        back = sum(item.outcome not in UNKNOWN for item in self.earlier)
        if self.earlier:
            found.append(f"{back} earlier set(s) no longer forgotten" if back else "earlier sets still forgotten")
        return ", ".join(found)

    @property
    def sentences(self) -> tuple[str, ...]:
        """The verdict for people: what was forgotten, what was kept, what is still forgotten."""
        found = [_forget_sentence(self.forget), _retain_sentence(self.retain)]
        if self.earlier:
            found.append(_earlier_sentence(self.earlier))
        return tuple(found)


@dataclass(frozen=True)
class RunVerdict:
    """The verdict over all rounds of a job, on what is in its files."""

    is_good: bool
    """Everything is measured and forgotten, the retain set is kept, and the files hold what was measured."""
    sentences: tuple[str, ...]
    """For people."""


def run_verdict(last: Verdict, survival: SurvivingUpdate) -> RunVerdict:
    """The verdict of a run from that of its last round, which scored all sets, and from what is left in the files."""
    sentences = last.sentences
    lost = not survival.projection >= SURVIVAL_LEVEL
    if lost:
        sentences += (
            f"NOT IN THE FILES: all this was measured before saving, and only {survival.projection:.1%} of the update "
            f"survives the saved dtype {survival.dtype}.",
        )
    return RunVerdict(last.is_good and not lost, sentences)


def _forget_sentence(found: ForgetVerdict | None) -> str:
    if found is None:
        return "Forgetting was not measured: without a holdout set nothing tells how hard unseen records are."
    numbers = (
        f"loss {found.loss.mean:.3f} nats per token where unseen records have {found.loss.holdout_mean:.3f}, "
        f"{1 - found.missed.mean:.1%} of the answers memorised where unseen records have "
        f"{1 - found.missed.holdout_mean:.1%}"
    )
    records = f"{found.num_records} record(s) to forget"
    if found.outcome == "forgotten":
        text = f"Forgotten: the {records} cannot be told from {found.num_holdout_records} unseen ones ({numbers})."
        if found.harder_than_holdout:
            text = f"Forgotten: the {records} are no easier than {found.num_holdout_records} unseen ones ({numbers})."
            text += " They are harder than unseen records, which shows that they were erased."
        return text
    if found.outcome == "nothing to forget":
        return (
            f"NOTHING TO FORGET WAS FOUND: before the first step the model already knew the {records} no better than "
            f"{found.num_holdout_records} unseen ones, and still does ({numbers}). Are the checkpoint, the ids and the "
            "data's format those of its training?"
        )
    known = f"; {found.num_known} of them are easier than nearly all unseen ones" if found.num_known else ""
    if found.outcome == "partly forgotten":
        return f"Partly forgotten: the {records} are still easier than unseen ones{known} ({numbers})."
    return f"NOT FORGOTTEN: the model still knows the {records}{known} ({numbers})."


def _retain_sentence(found: RetainVerdict) -> str:
    start = "Kept" if found.outcome == "kept" else "DAMAGED"
    numbers = (
        f"since the start of the job the loss on {found.num_records} retained record(s) changed by "
        f"{found.loss_rise_nats_per_token:+.3f} nats per token, the share memorised by {-found.memorised_drop:+.1%}"
    )
    return f"{start}: {numbers}."


def _earlier_sentence(found: tuple[ForgetVerdict, ...]) -> str:
    back = [item for item in found if item.outcome not in UNKNOWN]
    if not back:
        return f"Still forgotten: all {len(found)} earlier set(s)."
    named = ", ".join(
        f"{item.set_name.replace('_', ' ')} is {item.outcome} (loss {item.loss.mean:.3f} nats per token, unseen "
        f"records {item.loss.holdout_mean:.3f})"
        for item in back
    )
    return f"NO LONGER FORGOTTEN: of {len(found)} earlier set(s) {named}."

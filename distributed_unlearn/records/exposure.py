"""What an attacker could still get out of a model about a forget set. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number that was measured on records, and how sure it is."""

    value: float
    low: float | None
    """Of the 95 % bootstrap interval over records; None for fewer than two of them."""
    high: float | None
    num_records: int


@dataclass(frozen=True)
class Exposure:
    """Extraction and membership attacks after a round, on its forget set against the holdout set."""

    extraction_strength: Estimate
    """Mean share of a record's answer that the model completes by itself once it is given the rest."""
    extraction_strength_holdout: Estimate | None
    """The same of records that were never trained on: the reference. None without a holdout set."""
    membership_auc: Estimate | None
    """Area under the ROC curve of the attack that calls a record with a low loss a member: 1 fully known, 0.5 not to be
    told from a holdout record, below it forgotten beyond what an unseen record is. None without a holdout set."""

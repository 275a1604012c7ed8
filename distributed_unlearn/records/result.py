"""What became of an update: how its products were computed and what of it is left in the files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CurvatureMode:
    """How products were computed in the last round."""

    cached: bool | None
    """None where no product was asked for."""
    cached_gib: float
    """What cached mode keeps on the largest rank, measured; 0 where the mode was given."""


@dataclass(frozen=True)
class SurvivingUpdate:
    """How much of the update is left in the files, read back: saved weights against the weights at the start."""

    update_norm: float
    """`||Delta||` in fp32."""
    saved_update_norm: float
    """`||saved - w*||`."""
    projection: float
    """`<saved - w*, Delta> / ||Delta||^2`: 1 when the update survives whole, near 0 when rounding undoes it."""
    share_of_changed_weights: float
    """Share of the trainable weights whose saved value differs from the value at the start."""
    dtype: str

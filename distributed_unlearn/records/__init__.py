"""Plain records of what happened: per step, per round, per evaluated set. Ids and scalars, never text.

`dataclasses.asdict` turns each into JSON.
"""

from distributed_unlearn.records.result import CurvatureMode, SurvivingUpdate
from distributed_unlearn.records.round import RoundRecord
from distributed_unlearn.records.scores import SetScores
from distributed_unlearn.records.step import StepRecord

__all__ = ["CurvatureMode", "RoundRecord", "SetScores", "StepRecord", "SurvivingUpdate"]

"""Plain records of what happened: per step, per round, per run, per evaluated set. Ids and scalars, never text.

`codec.to_json` turns each into JSON, `read_record` a run's file into its record.
"""

from distributed_unlearn.records.codec import Json, to_json
from distributed_unlearn.records.exposure import Estimate, Exposure
from distributed_unlearn.records.result import CurvatureMode, SurvivingUpdate
from distributed_unlearn.records.round import RoundRecord
from distributed_unlearn.records.run import (
    RECORD_NAME,
    BaseCheckpoint,
    ResultFiles,
    RunRecord,
    TrainingRecord,
    read_record,
)
from distributed_unlearn.records.scores import SetScores
from distributed_unlearn.records.state import RoundState, read_state
from distributed_unlearn.records.step import StepRecord
from distributed_unlearn.records.verdict import RunVerdict, Verdict, run_verdict

__all__ = [
    "RECORD_NAME",
    "BaseCheckpoint",
    "CurvatureMode",
    "Estimate",
    "Exposure",
    "Json",
    "ResultFiles",
    "RoundRecord",
    "RoundState",
    "RunRecord",
    "RunVerdict",
    "SetScores",
    "StepRecord",
    "SurvivingUpdate",
    "TrainingRecord",
    "Verdict",
    "read_record",
    "read_state",
    "run_verdict",
    "to_json",
]

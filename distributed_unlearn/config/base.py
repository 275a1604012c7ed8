"""What every section of a job file is: frozen, strict, finite."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Base of all configuration models: frozen, unknown keys refused, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

"""When a round may end early, without a retrained model to compare with."""


class StoppingRule:
    """Stops once the forget set is as hard as data never trained on, and the retain loss is back where it was.

    A retrained model has never seen the forget set and finds it as hard as held-out data; a distance of zero between
    the two is the target that a round can measure by itself. State: the number of consecutive updates for which both
    conditions held.
    """

    def __init__(
        self,
        holdout_loss: float | None,
        initial_retain_loss: float,
        forget_tolerance: float,
        retain_tolerance: float,
        patience: int,
        max_seconds: float | None,
    ) -> None:
        """All losses and tolerances in nats per token; `holdout_loss` None disables the loss conditions.

        Raises:
            ValueError: a tolerance or `max_seconds` that is not positive, or `patience` below 1.
        """
        if not (forget_tolerance > 0.0 and retain_tolerance > 0.0 and patience >= 1):
            raise ValueError(
                f"got tolerances {forget_tolerance}, {retain_tolerance} and patience {patience}; "
                "expected positive tolerances and patience of at least 1"
            )
        if max_seconds is not None and not max_seconds > 0.0:
            raise ValueError(f"got max_seconds {max_seconds}; expected a positive number or None")
        self._holdout_loss = holdout_loss
        self._retain_limit = initial_retain_loss + retain_tolerance
        self._forget_tolerance = forget_tolerance
        self._patience = patience
        self._max_seconds = max_seconds
        self._num_consecutive = 0

    def update(
        self, step: int, forget_loss_distance: float | None, retain_loss: float, elapsed_seconds: float
    ) -> str | None:
        """A short sentence that says why to stop after this step, or None to go on.

        Args:
            step: index of the step just taken, for the sentence.
            forget_loss_distance: mean over forget records of |record's mean answer loss - holdout loss|, nats per
                token; None when it was not measured, which counts as not matching.
            retain_loss: on a fixed sample of the retain set, nats per token. NaN in either loss never stops.
            elapsed_seconds: since the round began.
        """
        if self._holdout_loss is not None:
            matches = forget_loss_distance is not None and forget_loss_distance <= self._forget_tolerance
            self._num_consecutive = self._num_consecutive + 1 if matches and retain_loss <= self._retain_limit else 0
            if self._num_consecutive >= self._patience:
                return (
                    f"after step {step} the forget loss is within {forget_loss_distance:.3f} nats per token of the "
                    f"holdout loss {self._holdout_loss:.3f} and the retain loss {retain_loss:.3f} is at most "
                    f"{self._retain_limit:.3f}, for {self._num_consecutive} consecutive steps"
                )
        return self.timeout(step, elapsed_seconds)

    def timeout(self, step: int, elapsed_seconds: float) -> str | None:
        """The part of the rule that needs no loss: `max_seconds`, or None to go on."""
        if self._max_seconds is not None and elapsed_seconds >= self._max_seconds:
            return f"max_seconds: {elapsed_seconds:.1f} s of {self._max_seconds:.1f} s were used up after step {step}"
        return None

"""What is minimised: sums of per-sequence terms over forget and retain minibatches."""

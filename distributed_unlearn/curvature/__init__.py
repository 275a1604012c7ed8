"""Loss, gradient and exact curvature products of a causal language model, segment by segment."""

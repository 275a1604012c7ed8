"""Scores of a model on the forget, retain and holdout sets."""

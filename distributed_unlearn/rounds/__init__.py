"""A round of unlearning and its record."""

"""Methods: what takes outer steps."""

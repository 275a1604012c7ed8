"""Model families, checkpoints and their processors."""

"""Distributed second-order unlearning of Hugging Face checkpoints (arXiv 2406.14507) on Ray and DeepSpeed ZeRO."""

__version__ = "0.1.0"

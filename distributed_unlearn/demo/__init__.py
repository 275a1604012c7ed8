"""The embedded default: fictitious people, a small Llama, the whole path."""

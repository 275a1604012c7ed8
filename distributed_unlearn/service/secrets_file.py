"""Tokens and keys in files that their owner alone can read."""

from pathlib import Path

from distributed_unlearn.errors import ConfigError

SHORTEST = 32
"""Characters: 128 bits in hexadecimal."""


def read_secret(path_text: str, what: str) -> str:
    """The text of a secret's file, without blanks around it.

    Args:
        path_text: The file.
        what: Its key in the service file, for errors.

    Raises:
        ConfigError: missing, readable by others, too short, or not plain ASCII.
    """
    path = Path(path_text).expanduser()
    remedy = f"(umask 077; openssl rand -hex 32 > '{path}')"
    try:
        text = path.read_text(encoding="ascii").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise ConfigError(f"{what} '{path}', which cannot be read ({reason})", "a secret's file", remedy) from error
    if mode & 0o077:
        raise ConfigError(
            f"{what} '{path}', which others can read", "a file for its owner alone", f"chmod 600 '{path}'"
        )
    if len(text) < SHORTEST or not text.isprintable() or " " in text:
        raise ConfigError(f"{what} '{path}' with an unfit secret", f"one line of {SHORTEST} characters or more", remedy)
    return text

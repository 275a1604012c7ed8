"""The operator's Ed25519 key: made, kept for its owner alone, and used to sign certificates and the ledger's head."""

import base64
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import CryptoSigner, Key, Signature, SSlibKey

from distributed_unlearn.errors import ConfigError
from distributed_unlearn.files import write_private


def generate_key(private: Path) -> Path:
    """Write a new key to `private` (PEM, mode 0600) and its public half beside it; returns the public half's path.

    Raises:
        ConfigError: one of the two files exists, or cannot be written.
    """
    public = private.with_suffix(".pub")
    for path in (private, public):
        if path.exists():
            raise ConfigError(
                f"key file '{path}', which exists", "a new file", "choose another name; never overwrite a key"
            )
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        write_private(private, pem.decode().strip())
        write_private(public, public_pem.decode().strip())
        os.chmod(public, 0o644)
    except OSError as error:
        raise ConfigError(
            f"key file '{private}', which cannot be written ({error.strerror})",
            "an existing folder",
            "choose another path",
        ) from error
    return public


def load_signer(path: Path) -> CryptoSigner:
    """The signer of a private key file.

    Raises:
        ConfigError: missing, readable by others, or no Ed25519 key.
    """
    data = _read(path, "private key")
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"private key '{path}', which others can read", "a file for its owner alone", f"chmod 600 '{path}'"
        )
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "private")
    return CryptoSigner(key, SSlibKey.from_crypto(key.public_key()))


def load_public_key(path: Path) -> Key:
    """The public key of a file.

    Raises:
        ConfigError: missing, or no Ed25519 key.
    """
    data = _read(path, "public key")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, "public")
    return SSlibKey.from_crypto(key)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{what} '{path}', which cannot be read ({error.strerror})", "a key file", "make one with `key generate`"
        ) from error


def _no_key(path: Path, half: str) -> ConfigError:
    return ConfigError(
        f"'{path}', which holds no Ed25519 {half} key in PEM", f"a {half} key of `key generate`", "check the path"
    )


def sign_text(signer: CryptoSigner, text: str) -> str:
    """The signature of a text, base64."""
    return base64.b64encode(bytes.fromhex(signer.sign(text.encode()).signature)).decode()


def signature_holds(key: Key, text: str, signature: str) -> bool:
    """Whether `signature` (base64) is this key's of `text`."""
    try:
        key.verify_signature(Signature(key.keyid, base64.b64decode(signature, validate=True).hex()), text.encode())
    except (UnverifiedSignatureError, VerificationError, ValueError):
        return False
    return True

"""Who may come in: API keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from lockstep.errors import UsageError
from lockstep.server.settings import ServerSettings, is_loopback

OPEN_PATHS = frozenset({"/health", "/ready"})
"""For load balancers; they tell nothing about the model or its users."""


def load_keys(settings: ServerSettings) -> list[str]:
    """All keys: those given and those of the key file, one a line, `#` begins a comment.

    Raises `UsageError` for an unreadable or empty key file, and for a server that the network could reach
    without a key.
    """
    keys = [key for key in settings.api_keys if key]
    if settings.api_key_file:
        keys += _read_keys(Path(settings.api_key_file))
    if not keys and not settings.no_auth and not is_loopback(settings.host):
        raise UsageError(
            f"listening on {settings.host} would let in everyone who can reach it: "
            "set --api-key or --api-key-file, or say --no-auth"
        )
    return keys


def _read_keys(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the API keys in {path}: {error}") from error
    keys = [key for line in lines if (key := line.split("#", 1)[0].strip())]
    if not keys:
        raise UsageError(f"{path} holds no API key: one a line, # begins a comment")
    return keys


class Keys:
    """Compares in constant time, and always with every key."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: str) -> str | None:
        """A short name for the holder of this `Authorization` header's key; None for a stranger."""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:12] if any(matches) and scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

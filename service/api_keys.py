"""API keys: who may ask, known by the SHA-256 of their keys alone.

A key is 256 random bits, so its plain hash cannot be searched for; nobody can read a key out of a setting,
a backup or a core dump. Clients have names, which logs and metrics show; keys are shown once, when they are
made.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import TYPE_CHECKING, Final

from service.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["KeyRing", "key_hash", "new_key", "parse_key_hashes", "read_key_file"]

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_KEY_BYTES: Final = 32


def new_key() -> str:
    """A random key of 256 bits, in characters that need no quoting."""
    return f"lamamba-{secrets.token_urlsafe(_KEY_BYTES)}"


def key_hash(key: str) -> str:
    """SHA-256 of a key as 64 hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse_key_hashes(entries: Iterable[str]) -> dict[str, str]:
    """Hashes by name, from `name:hash` each.

    Raises ValueError, which repeats no hash, for a name that is none or comes twice, or a hash that is none.
    """
    hashes: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        name, separator, digest = (part.strip() for part in entry.partition(":"))
        if not separator or not _NAME.fullmatch(name):
            raise ValueError(f"entry {number}: name:hash is accepted, the name 1 to 64 of A-Z a-z 0-9 . _ -")
        if name in hashes:
            raise ValueError(f"entry {number}: the name {name} is given twice")
        if not _HASH.fullmatch(digest.lower()):
            raise ValueError(
                f"entry {number}: a SHA-256 in 64 hexadecimal digits is accepted, as "
                f"`lamamba api-key {name}` prints it"
            )
        hashes[name] = digest.lower()
    return hashes


def read_key_file(path: Path) -> dict[str, str]:
    """Hashes by name from a file of one `name:hash` a line; # begins a comment.

    Raises StartupError with one line that names the file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise StartupError(f"api_keys_file: {path} given; not readable ({type(error).__name__})") from error
    entries = [line.partition("#")[0].strip() for line in lines]
    try:
        return parse_key_hashes(entry for entry in entries if entry)
    except ValueError as error:
        raise StartupError(f"api_keys_file: {path} given; {error}") from error


class KeyRing:
    """The keys that are accepted. Falsy without any: then everybody is."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = dict(hashes)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def has_any_of(self, hashes: Iterable[str]) -> bool:
        """Whether a key of one of these hashes is accepted."""
        return not set(hashes).isdisjoint(self._hashes.values())

    def name_of(self, key: str) -> str | None:
        """The name that a key goes by, or None; every hash is compared, whichever matches."""
        found = None
        digest = key_hash(key)
        for name, expected_hash in self._hashes.items():
            if hmac.compare_digest(digest, expected_hash):
                found = name
        return found

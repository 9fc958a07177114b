"""The text of an API key: `csk_<id>_<random>_<checksum>`.

The prefix lets secret scanners find a leaked key, the checksum lets anybody reject a typing error without a look-up,
the id says which record to compare with, and 160 random bits make a plain SHA-256 of the whole safe to store: there is
nothing to guess, so nothing to slow down with a password hash.
"""

import hashlib
import re
import secrets
import zlib
from typing import Final

from orchestrator.ids import new_id

PREFIX: Final = "csk_"
MAX_CHARACTERS: Final = 512
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
_RANDOM_CHARACTERS: Final = 32  # 5 bits each
_CHECKSUM_CHARACTERS: Final = 7  # 32 bits
_SECRET: Final = re.compile(r"(csk_([a-z2-7]{20})_[a-z2-7]{32})_([a-z2-7]{7})")
_KEY_ID_PREFIX: Final = "key"


def new_secret() -> tuple[str, str]:
    """A new key's record id (`key_…`) and its secret."""
    key_id = new_id(_KEY_ID_PREFIX)
    random = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))
    body = f"{PREFIX}{key_id.removeprefix('key_')}_{random}"
    return key_id, f"{body}_{_checksum(body)}"


def key_id_of(secret: str) -> str | None:
    """The record id that a secret names; None when it is not a key of ours or has a typing error in it."""
    found = _SECRET.fullmatch(secret)
    if found is None or _checksum(found[1]) != found[3]:
        return None
    return f"{_KEY_ID_PREFIX}_{found[2]}"


def digest(secret: str) -> str:
    """SHA-256 as 64 hexadecimal digits: what is stored instead of the secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _checksum(body: str) -> str:
    value = zlib.crc32(body.encode("ascii"))
    return "".join(_ALPHABET[value >> 5 * place & 31] for place in range(_CHECKSUM_CHARACTERS))

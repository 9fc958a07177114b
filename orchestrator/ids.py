"""Identifiers: a prefix that says what it is, and 100 random bits in lower-case letters and digits.

Only `[a-z0-9_]`, so that an id can stand in a URL, a file name, a container label and a Redis key as it is.
"""

import re
import secrets
from typing import Final

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
_RANDOM_CHARACTERS: Final = 20  # 5 bits each
_ID: Final = re.compile(r"[a-z]{2,8}_[a-z0-9]{1,40}")


def new_id(prefix: str) -> str:
    """`new_id("cs")` gives for example `cs_k5xq…`."""
    return f"{prefix}_" + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))


def is_id(value: str, prefix: str) -> bool:
    """Whether `value` has the shape of an id with this prefix. Says nothing about whether it exists."""
    return value.startswith(f"{prefix}_") and _ID.fullmatch(value) is not None

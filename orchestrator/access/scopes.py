"""What a key may do. Holding one scope never implies another."""

from enum import StrEnum


class Scope(StrEnum):
    READ = "code-sessions:read"
    WRITE = "code-sessions:write"
    DEPLOY = "code-sessions:deploy"
    ADMIN = "api-keys:admin"

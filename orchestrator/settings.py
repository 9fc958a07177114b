"""The only reader of the environment. Every setting is `CODE_SESSIONS_<NAME>`; README has the table."""

import hashlib
import importlib.util
import os
import re
import tempfile
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from platformdirs import user_data_dir
from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_SOCKET_PATH_MAX_BYTES = 103  # unix(7): sun_path is 108 bytes on Linux, 104 on macOS, with the final NUL
_LONGEST_SOCKET_NAME = "link/link-xxxxxxxxxxxxxxxx.sock"


class RuntimeKind(StrEnum):
    LOCAL = "local"
    DOCKER = "docker"


class SettingsError(Exception):
    """The environment asks for something that cannot be; the message is for the operator."""


class WorkspaceLimits(BaseModel):
    """What one workspace container may use."""

    memory_bytes: int
    cpus: float
    pids: int


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="CODE_SESSIONS_", env_ignore_empty=True, frozen=True, extra="ignore")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    public_url: str = ""
    allowed_origins: str = ""  # of pages that may attach to terminals, comma separated, besides our own
    data_dir: Path = Field(default_factory=lambda: Path(user_data_dir("code-sessions")))
    redis_url: str = ""
    runtime: RuntimeKind = RuntimeKind.LOCAL
    rate_limit_per_minute: Annotated[int, Field(ge=0)] = 600
    output_retention_bytes: Annotated[int, Field(ge=65536)] = 64 * 1024 * 1024
    output_retention_days: Annotated[float, Field(ge=0)] = 30  # after a session's end; 0: for ever
    admin_key: Annotated[SecretStr, Field(min_length=32)] | None = None

    gateway_host: str = "127.0.0.1"
    gateway_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    gateway_public_url: str = ""  # with `{app}` where the application's name goes
    gateway_trusted_proxies: str = ""  # addresses and networks by comma whose X-Forwarded-* are believed
    log_level: str = "info"
    create_timeout_s: Annotated[float, Field(gt=0, le=600)] = 60

    workspace_image: str = "code-sessions/workspace:latest"
    app_image: str = "code-sessions/app:latest"
    workspace_memory_mb: Annotated[int, Field(ge=64)] = 1024
    workspace_cpus: Annotated[float, Field(gt=0)] = 1.0
    workspace_pids: Annotated[int, Field(ge=16)] = 512
    link_dir: Path | None = None  # where the sidecars' socket is; default: below the data folder
    link_mount: str = ""  # what Docker mounts as that folder: a volume's name when `serve` runs in a container
    archive_url: str = ""  # "s3://bucket/prefix"; empty: a folder below the data folder
    archive_endpoint_url: str = ""
    build_allowed_hosts: str = (
        ""  # names (or name:port), with commas between, that builds may reach in private networks
    )
    gateway_container: str = ""  # compose: the container that the worker joins to each application's network

    @model_validator(mode="after")
    def _local_is_loopback_only(self) -> Self:
        if self.runtime is RuntimeKind.LOCAL:
            for name, host in (("HOST", self.host), ("GATEWAY_HOST", self.gateway_host)):
                if not _is_loopback(host):
                    msg = (
                        f"CODE_SESSIONS_{name}={host} is not a loopback address. Local workspaces are not isolated: "
                        "whoever reaches the API can run commands as you. Use 127.0.0.1, or "
                        "CODE_SESSIONS_RUNTIME=docker."
                    )
                    raise ValueError(msg)
        return self

    @field_validator("gateway_trusted_proxies")
    @classmethod
    def _are_networks(cls, value: str) -> str:
        _networks(value)
        return value

    @property
    def trusted_proxies(self) -> tuple[IPv4Network | IPv6Network, ...]:
        return _networks(self.gateway_trusted_proxies)

    @property
    def embedded_store(self) -> bool:
        return not self.redis_url

    @property
    def limits(self) -> WorkspaceLimits:
        return WorkspaceLimits(
            memory_bytes=self.workspace_memory_mb * 1024 * 1024, cpus=self.workspace_cpus, pids=self.workspace_pids
        )

    @property
    def origin(self) -> str:
        """The API's origin as clients see it, without a final slash."""
        return (self.public_url or f"http://{_in_url(self.host)}:{self.port}").rstrip("/")

    @property
    def origins(self) -> frozenset[str]:
        """What a browser may say as `Origin` of pages that attach to terminals."""
        own = urlsplit(self.origin)
        named = (origin.strip().rstrip("/") for origin in self.allowed_origins.split(","))
        return frozenset({f"{own.scheme}://{own.netloc}", *(origin for origin in named if origin)})

    @property
    def app_url_template(self) -> str:
        """An application's URL with `{app}` for its host name label."""
        return self.gateway_public_url or f"http://{{app}}.localhost:{self.gateway_port}/"

    @property
    def archives_dir(self) -> Path:
        return self.data_dir.absolute() / "archives"

    @property
    def run_dir(self) -> Path:
        """Short enough for Unix sockets: below the data folder, else in the temporary folder."""
        inside = self.data_dir / "run"
        if len(os.fsencode(inside / _LONGEST_SOCKET_NAME)) <= _SOCKET_PATH_MAX_BYTES:
            return inside
        name = hashlib.sha256(os.fsencode(self.data_dir.absolute())).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"code-sessions-{os.getuid()}-{name}"

    @property
    def link_socket_dir(self) -> Path:
        return self.link_dir or self.run_dir / "link"


def _networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment.

    Raises:
        SettingsError: with one line for each setting that is wrong.
    """
    try:
        settings = Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = "_".join(str(part) for part in problem["loc"] if part != "function-after").upper()
            text = problem["msg"].removeprefix("Value error, ")
            lines.append(f"CODE_SESSIONS_{name}: {text}" if name else text)
        raise SettingsError("\n".join(lines)) from None
    for name, url in (("PUBLIC_URL", settings.public_url), ("GATEWAY_PUBLIC_URL", settings.gateway_public_url)):
        if url and urlsplit(url).scheme not in {"http", "https"}:
            raise SettingsError(f"CODE_SESSIONS_{name}: not an http(s) URL: {url}")
    if settings.archive_url and not re.fullmatch(r"s3://[^/\s]+(/\S*)?", settings.archive_url):
        raise SettingsError(
            f"CODE_SESSIONS_ARCHIVE_URL: not a bucket's URL (s3://bucket/prefix): {settings.archive_url}"
        )
    if settings.archive_url and importlib.util.find_spec("boto3") is None:
        raise SettingsError("CODE_SESSIONS_ARCHIVE_URL: archives in a bucket need boto3: install code-sessions[s3]")
    for origin in settings.origins:
        parts = urlsplit(origin)
        if not parts.netloc or parts.path or parts.query:
            raise SettingsError(f"CODE_SESSIONS_ALLOWED_ORIGINS: not an origin such as https://example.com: {origin}")
    return settings

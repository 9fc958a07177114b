"""`code-sessions keys …`: the operator's way to keys, straight to the store. Imports as in `main`."""

import json
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from orchestrator.access.scopes import Scope

if TYPE_CHECKING:
    from orchestrator.access.keys import ApiKey, KeyStore

Result = TypeVar("Result")

app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True, rich_markup_mode=None)

_DAY_MS = 24 * 60 * 60 * 1000
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    scope: Annotated[list[Scope] | None, typer.Option(help="What it may do; once for each scope.")] = None,
    user: Annotated[str | None, typer.Option(help="Whose it is, user_…; default: a new one.")] = None,
    organization: Annotated[str | None, typer.Option(help="Of which organization, org_…; default: a new one.")] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, max=36500, help="Default: it does not expire.")] = None,
    rate_limit_per_minute: Annotated[int | None, typer.Option(min=0, help="Requests a minute; 0: no limit.")] = None,
    operator: Annotated[bool, typer.Option("--operator", help="An operator's key: not limited in its rate.")] = False,
    as_json: _Json = False,
) -> None:
    """Make a key and print its secret, which is shown this once."""
    if not scope:
        raise typer.BadParameter(f"give at least one of {', '.join(Scope)}", param_hint="--scope")
    expires_at_ms = None if expires_in_days is None else time.time_ns() // 1_000_000 + expires_in_days * _DAY_MS

    def run(keys: "KeyStore") -> "Awaitable[tuple[ApiKey, str]]":
        return keys.create(
            name=name,
            scopes=scope or (),
            user_id=user,
            organization_id=organization,
            operator=operator,
            rate_limit_per_minute=rate_limit_per_minute,
            expires_at_ms=expires_at_ms,
        )

    key, secret = _with_keys(run)
    if as_json:
        typer.echo(json.dumps({**_as_json(key), "secret": secret}))
        return
    typer.echo(f"{key.id} of {key.user_id} in {key.organization_id}: {' '.join(sorted(key.scopes))}", err=True)
    typer.echo("The key, shown this once:", err=True)
    typer.echo(secret)


@app.command("list")
def list_keys(
    organization: Annotated[str | None, typer.Option(help="Only of this organization.")] = None, as_json: _Json = False
) -> None:
    """List keys, newest first, revoked ones too. Secrets are not kept anywhere."""
    found = _with_keys(lambda keys: keys.list(organization))
    if as_json:
        typer.echo(json.dumps([_as_json(key) for key in found]))
        return
    rows = [("ID", "NAME", "STATE", "ORGANIZATION", "USER", "SCOPES")]
    rows += [
        (key.id, key.name, _state(key), key.organization_id, key.user_id, " ".join(sorted(key.scopes))) for key in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="key_…")], as_json: _Json = False) -> None:
    """End a key. Every replica refuses it within a second."""
    key = _with_keys(lambda keys: keys.revoke(None, key_id))
    typer.echo(json.dumps(_as_json(key)) if as_json else f"{key.id} ({key.name}) is revoked.")


def _with_keys(use: "Callable[[KeyStore], Awaitable[Result]]") -> Result:
    """Run `use` on the store that the settings name.

    Raises:
        SettingsError, OrchestratorError, RedisError: for `main`, which prints them.
    """
    import asyncio  # noqa: PLC0415 - `--help` answers without all of this

    from orchestrator.access.keys import KeyStore  # noqa: PLC0415
    from orchestrator.settings import load_settings  # noqa: PLC0415
    from orchestrator.store.opening import open_store  # noqa: PLC0415

    async def run() -> Result:
        async with open_store(load_settings(), role="keys") as client:
            return await use(KeyStore(client))

    return asyncio.run(run())


def _state(key: "ApiKey") -> str:
    if key.revoked_at_ms is not None:
        return "revoked"
    return "active" if key.refused(time.time_ns() // 1_000_000) is None else "expired"


def _as_json(key: "ApiKey") -> dict[str, object]:
    """As the REST API names its fields."""
    from orchestrator.api.body import timestamp  # noqa: PLC0415

    def moment(ms: int | None) -> str | None:
        return None if ms is None else timestamp(ms)

    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "userId": key.user_id,
        "organizationId": key.organization_id,
        "operator": key.operator,
        "rateLimitPerMinute": key.rate_limit_per_minute,
        "createdAt": moment(key.created_at_ms),
        "expiresAt": moment(key.expires_at_ms),
        "revokedAt": moment(key.revoked_at_ms),
        "lastUsedAt": moment(key.last_used_at_ms),
    }

"""The `code-sessions` command. Imports stay inside the commands, so that `--help` answers at once."""

import importlib
import sys

import typer

from orchestrator.cli import keys

app = typer.Typer(
    name="code-sessions",
    help="Terminal-attached coding workspaces behind a REST API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(keys.app, name="keys")


@app.command()
def serve() -> None:
    """Run the control plane, in the embedded default with a deploy worker inside."""
    _run("serve")


@app.command()
def worker() -> None:
    """Run a deploy worker alone."""
    _run("worker")


@app.command()
def gateway() -> None:
    """Run the gateway alone: the front door of deployed applications."""
    _run("gateway")


def _run(entry: str) -> None:
    """Run one of `orchestrator.cli.serve`'s coroutines until it is told to end."""
    from orchestrator.settings import load_settings  # noqa: PLC0415 - see above

    # By name: everything that the servers are made of is behind this import.
    servers = importlib.import_module("orchestrator.cli.serve")
    settings = load_settings()
    servers.run(getattr(servers, entry)(settings), settings)


def main() -> None:
    """Exit codes: 0 done, 1 it failed, 2 the command or the settings are wrong. Errors go to stderr."""
    try:
        app()
    except Exception as error:
        if (exit_code := _expected(error)) is None:
            raise
        sys.stderr.write(f"code-sessions: {_message(error)}\n")
        sys.exit(exit_code)


def _expected(error: Exception) -> int | None:
    """The exit code of a failure that the operator can act on; None for one that only we can."""
    from redis.exceptions import RedisError  # noqa: PLC0415 - see above

    from orchestrator.errors import InvalidRequest, OrchestratorError  # noqa: PLC0415
    from orchestrator.settings import SettingsError  # noqa: PLC0415

    if isinstance(error, SettingsError | InvalidRequest):
        return 2
    return 1 if isinstance(error, OrchestratorError | RedisError) else None


def _message(error: Exception) -> str:
    from redis.exceptions import RedisError  # noqa: PLC0415 - see above

    return f"the store cannot be used: {error}" if isinstance(error, RedisError) else str(error)


if __name__ == "__main__":
    main()

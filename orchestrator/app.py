"""The composition root: builds everything, owns every task's and every connection's lifetime."""

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from deploy_pipeline.archive_s3 import open_archives
from deploy_pipeline.logs import LogStore
from deploy_pipeline.orders import Orders
from deploy_pipeline.queue import DeploymentQueue
from orchestrator.access.keys import KeyStore
from orchestrator.access.rate_limit import RateLimiter
from orchestrator.access.tickets import TicketStore
from orchestrator.api import apps, attach, logs, output_stream, previews, recording, sessions, terminal, tickets
from orchestrator.api import deployments as deployments_api
from orchestrator.api.auth import setup_auth
from orchestrator.api.body import MAX_BODY_BYTES
from orchestrator.api.health import health_routes
from orchestrator.api.keys import APPS, DEPLOYMENTS, LIFECYCLE, LOGS, PREVIEWS, REGISTRY, SETTINGS, TERMINALS
from orchestrator.api.live import setup_live
from orchestrator.api.problems import setup_problems
from orchestrator.api.runner import ProblemAppRunner
from orchestrator.deployments.apps import Apps
from orchestrator.deployments.logs import Logs
from orchestrator.deployments.previews import Previews
from orchestrator.deployments.service import Deployments
from orchestrator.runtimes.base import WorkspaceRuntime
from orchestrator.runtimes.local import LocalRuntime
from orchestrator.sessions.lifecycle import SessionLifecycle
from orchestrator.sessions.registry import SessionRegistry
from orchestrator.sessions.terminals import Terminals
from orchestrator.settings import RuntimeKind, Settings, SettingsError
from orchestrator.store.bus import Bus
from orchestrator.store.connection import StoreClient, connect, store_identity
from orchestrator.store.embedded import EmbeddedValkey
from orchestrator.store.folders import private_folder
from orchestrator.tasks import TaskOwner
from orchestrator.terminal.directory import LinkDirectory
from orchestrator.terminal.hub import Hub
from orchestrator.terminal.link_endpoint import LinkEndpoint
from orchestrator.terminal.output_store import OutputStore

_BACKLOG: Final = 1024
DRAIN_S: Final = 5.0  # what running requests get when the process is asked to stop

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """What `serve` needs to know of a running control plane."""

    first_key: str | None  # shown once, at the first start


@asynccontextmanager
async def own_store(settings: Settings) -> AsyncIterator[StoreClient]:
    """The store that the settings name: a server elsewhere, or an embedded one that lives as long as we do."""
    async with AsyncExitStack() as stack:
        if settings.embedded_store:
            embedded = EmbeddedValkey(settings.data_dir.absolute(), settings.run_dir.absolute())
            await stack.enter_async_context(embedded)
            target: str | Path = embedded.socket_path
        else:
            target = settings.redis_url
        yield await stack.enter_async_context(connect(target))


def make_runtime(settings: Settings, installation: str) -> WorkspaceRuntime:
    if settings.runtime is RuntimeKind.LOCAL:
        return LocalRuntime(settings.data_dir.absolute() / "workspaces", settings.link_socket_dir.absolute())
    # docker-py takes 120 ms to import, and only this runtime needs it.
    from orchestrator.runtimes.docker import DockerRuntime  # noqa: PLC0415

    return DockerRuntime(
        image=settings.workspace_image,
        limits=settings.limits,
        link_mount=settings.link_mount or str(settings.link_socket_dir.absolute()),
        installation=installation,
    )


async def installation_id(redis: StoreClient) -> str:
    """What this installation's containers are labelled with: made once, kept in the store."""
    await redis.set("cs:installation", secrets.token_hex(8), nx=True)
    stored = await redis.get("cs:installation")
    assert isinstance(stored, bytes)
    return stored.decode()


@dataclass(frozen=True, slots=True)
class _Services:
    output: OutputStore
    bus: Bus
    hub: Hub
    registry: SessionRegistry
    lifecycle: SessionLifecycle
    terminals: Terminals
    deployments: Deployments
    previews: Previews


def _services(settings: Settings, redis: StoreClient, runtime: WorkspaceRuntime, tasks: TaskOwner) -> _Services:
    replica_id = secrets.token_hex(8)
    output = OutputStore(
        redis, retention_bytes=settings.output_retention_bytes, retention_days=settings.output_retention_days
    )
    registry = SessionRegistry(redis)
    bus = Bus(redis)
    hub = Hub(output, bus, LinkDirectory(redis, replica_id), tasks, lambda: store_identity(redis))
    lifecycle = SessionLifecycle(registry, runtime, hub, output, tasks, create_timeout_s=settings.create_timeout_s)
    terminals = Terminals(registry, hub, output)
    archives = open_archives(settings.archives_dir, settings.archive_url, settings.archive_endpoint_url)
    consumer = f"control-plane-{replica_id}"
    deployments = Deployments(registry, terminals, DeploymentQueue(redis), archives, consumer=consumer)
    previews_of = Previews(registry, terminals, archives, settings.runtime)
    return _Services(output, bus, hub, registry, lifecycle, terminals, deployments, previews_of)


@asynccontextmanager
async def control_plane(settings: Settings, redis: StoreClient, listener: socket.socket) -> AsyncIterator[ControlPlane]:
    """The REST API on `listener` and the sidecars' link; everything is ended in order on the way out."""
    async with AsyncExitStack() as stack:
        keys = KeyStore(redis)
        admin_key = settings.admin_key.get_secret_value() if settings.admin_key is not None else None
        first_key = await keys.ensure_first_key(admin_key)
        runtime = make_runtime(settings, await installation_id(redis))
        stack.push_async_callback(runtime.close)
        tasks = TaskOwner()
        services = _services(settings, redis, runtime, tasks)
        hub, lifecycle = services.hub, services.lifecycle
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app[SETTINGS], app[REGISTRY], app[LIFECYCLE] = settings, services.registry, lifecycle
        app[TERMINALS], app[DEPLOYMENTS] = services.terminals, services.deployments
        app[APPS] = Apps(services.deployments, DeploymentQueue(redis), Orders(redis))
        app[LOGS] = Logs(services.deployments, LogStore(redis))
        app[PREVIEWS] = services.previews
        setup_problems(app)
        setup_auth(app, keys, RateLimiter(redis, settings.rate_limit_per_minute))
        setup_live(app)
        app.on_shutdown.append(_ending_waits(hub))
        app[tickets.TICKETS] = TicketStore(redis)
        terminals_api = (sessions, terminal, output_stream, tickets, attach, recording)
        for module in (*terminals_api, deployments_api, previews, apps, logs):
            module.add_routes(app.router)
        app.add_routes(health_routes({"store": redis.ping, "runtime": runtime.check}))

        endpoint = LinkEndpoint(
            hub,
            services.output,
            authenticate=lifecycle.authenticate_link,
            on_linked=lifecycle.on_linked,
            on_appended=lifecycle.on_appended,
            on_lost=lifecycle.on_link_lost,
        )
        tasks.keep(services.bus.run, name="bus")
        await hub.relay.start()
        stop_listening = await stack.enter_async_context(_link_listener(settings, endpoint))
        stack.push_async_callback(tasks.close)
        stack.push_async_callback(hub.close)
        stack.push_async_callback(stop_listening)  # or sidecars would dial us again as soon as their link is closed
        await stack.enter_async_context(_api_listener(listener, app))
        tasks.keep(lifecycle.reconcile_forever, name="reconcile")
        tasks.keep(hub.watch_store, name="watch store")
        tasks.keep(services.deployments.archive_forever, name="archive")
        tasks.keep(services.deployments.sweep_forever, name="sweep deployments")
        yield ControlPlane(first_key)


def _ending_waits(hub: Hub) -> Callable[[web.Application], Awaitable[None]]:
    async def end(_app: web.Application) -> None:
        hub.stop_waiting()

    return end


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any that is free.

    Raises:
        SettingsError: the address is not ours or taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise SettingsError(f"Cannot listen on {host}:{port}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener


@asynccontextmanager
async def _api_listener(listener: socket.socket, app: web.Application) -> AsyncIterator[None]:
    runner = ProblemAppRunner(app, access_log=None, shutdown_timeout=DRAIN_S)
    await runner.setup()
    try:
        await web.SockSite(runner, listener, backlog=_BACKLOG).start()
        yield
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _link_listener(settings: Settings, endpoint: LinkEndpoint) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """A socket of our own in the folder that sidecars look into; those of replicas that died are removed.

    What comes back takes it away, so that nobody new dials in; the links that are up stay up.
    """
    folder = private_folder(settings.link_socket_dir.absolute())
    for path in folder.glob("*.sock"):
        if not _somebody_listens(path):
            path.unlink(missing_ok=True)
    path = folder / f"link-{secrets.token_hex(8)}.sock"
    runner = web.AppRunner(endpoint.application(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        # Bound under another name and renamed when only we may connect: no moment is left in between.
        unready = path.with_suffix(".new")
        site = web.UnixSite(runner, str(unready), backlog=_BACKLOG)
        await site.start()
        unready.chmod(0o600)
        unready.rename(path)

        async def stop_listening() -> None:
            path.unlink(missing_ok=True)
            await site.stop()

        yield stop_listening
    finally:
        path.unlink(missing_ok=True)
        await runner.cleanup()


def _somebody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        with suppress(OSError):
            probe.connect(str(path))
            return True
    return False


async def wait_for_store(redis: StoreClient) -> None:
    """Return when the store answers; says so in the log while it does not."""
    while True:
        try:
            await redis.ping()
        except Exception as error:  # noqa: BLE001 - whatever keeps it from answering
            log.warning("waiting for the store", reason=str(error))
            await asyncio.sleep(1)
        else:
            return

"""The long-running commands: `serve`, `worker` and `gateway`."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, TypeAlias

import structlog
from aiohttp import web

from deploy_pipeline.gateway import GatewayConfig, build_gateway
from deploy_pipeline.worker import Worker, WorkerConfig
from orchestrator.app import control_plane, installation_id, listen, own_store, wait_for_store
from orchestrator.settings import Settings
from orchestrator.store.connection import StoreClient
from orchestrator.tasks import end_tasks, keep_running

Begin: TypeAlias = Callable[[AsyncExitStack, Settings, StoreClient], Awaitable[None]]

log = structlog.get_logger(__name__)

STUCK_THREADS_S: Final = 1.0
_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def run(settings: Settings) -> None:
    """`code-sessions serve`, until SIGTERM or SIGINT.

    Raises:
        SettingsError: the settings cannot be served: a port or the data folder is taken, for example.
    """
    _run(settings, _begin_serve)


def run_worker(settings: Settings) -> None:
    """`code-sessions worker`."""
    _run(settings, _begin_worker)


def run_gateway(settings: Settings) -> None:
    """`code-sessions gateway`."""
    _run(settings, _begin_gateway)


def _run(settings: Settings, begin: Begin) -> None:
    _configure_logging(settings.log_level)
    work = _until_stopped(settings, begin)
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)
    _leave()


def _leave() -> None:
    """End the process at once: everything is closed by now.

    Not by returning. Python would wait a minute for a call to an engine that does not answer (what it was asked for is
    found again by its labels), and takes its memory apart, which costs 0.3 s of processor time for 100 sessions: ten
    seconds where their workspaces leave us a thirtieth of it.
    """
    give_up_at = time.monotonic() + STUCK_THREADS_S
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0, give_up_at - time.monotonic()))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


async def _until_stopped(settings: Settings, begin: Begin) -> None:
    """Open the store, begin, and end all of it in order at SIGTERM or SIGINT."""
    stopping = _stop_on_signals()
    async with AsyncExitStack() as stack:
        redis = await _until(stopping, _ready_store(stack, settings))
        if redis is not None:
            await begin(stack, settings, redis)
            await stopping.wait()
            log.info("stopping")


async def _begin_serve(stack: AsyncExitStack, settings: Settings, redis: StoreClient) -> None:
    """The control plane; with the embedded store, a deploy worker and the gateway inside."""
    api = stack.enter_context(listen(settings.host, settings.port))
    settings = settings.model_copy(update={"port": api.getsockname()[1]})  # when it was 0
    if settings.embedded_store:
        apps = stack.enter_context(listen(settings.gateway_host, settings.gateway_port))
        settings = settings.model_copy(update={"gateway_port": apps.getsockname()[1]})
        await stack.enter_async_context(_gateway(apps, redis, settings))
        await stack.enter_async_context(_running_worker(settings, redis))
    plane = await stack.enter_async_context(control_plane(settings, redis, api))
    print(_welcome(settings, plane.first_key), flush=True)  # noqa: T201 - what the person at the terminal is waiting for


async def _begin_worker(stack: AsyncExitStack, settings: Settings, redis: StoreClient) -> None:
    await stack.enter_async_context(_running_worker(settings, redis))
    log.info("worker ready")


async def _begin_gateway(stack: AsyncExitStack, settings: Settings, redis: StoreClient) -> None:
    listener = stack.enter_context(listen(settings.gateway_host, settings.gateway_port))
    await stack.enter_async_context(_gateway(listener, redis, settings))
    log.info("gateway ready", host=settings.gateway_host, port=settings.gateway_port)


@asynccontextmanager
async def _running_worker(settings: Settings, redis: StoreClient) -> AsyncIterator[None]:
    """A deploy worker at work meanwhile."""
    config = WorkerConfig(
        runtime=settings.runtime.value,
        data_dir=settings.data_dir.absolute(),
        app_url_template=settings.app_url_template,
        app_image=settings.app_image,
        gateway_container=settings.gateway_container,
        archive_url=settings.archive_url,
        archive_endpoint_url=settings.archive_endpoint_url,
        build_allowed_hosts=frozenset(filter(None, map(str.strip, settings.build_allowed_hosts.lower().split(",")))),
        installation=await installation_id(redis),
    )
    worker = Worker(redis, config)
    task = asyncio.create_task(keep_running(worker.run, name="deploy worker"))
    try:
        yield
    finally:
        await end_tasks(task)


async def _ready_store(stack: AsyncExitStack, settings: Settings) -> StoreClient:
    redis = await stack.enter_async_context(own_store(settings))
    await wait_for_store(redis)
    return redis


@asynccontextmanager
async def _gateway(listener: socket.socket, redis: StoreClient, settings: Settings) -> AsyncIterator[None]:
    config = GatewayConfig(app_url_template=settings.app_url_template, trusted_proxies=settings.trusted_proxies)
    runner = web.AppRunner(build_gateway(redis, config), access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        yield
    finally:
        await runner.cleanup()


def _stop_on_signals() -> asyncio.Event:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    return stopping


async def _until(stopping: asyncio.Event, work: Awaitable[StoreClient]) -> StoreClient | None:
    """The result, or None when we are to stop before it is there."""
    task = asyncio.ensure_future(work)
    stop = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None


def _configure_logging(level: str) -> None:
    number = _LEVELS.get(level.lower(), logging.INFO)
    logging.basicConfig(stream=sys.stderr, level=number, format="%(message)s")
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
    processors: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    pretty = sys.stderr.isatty()
    renderer: structlog.types.Processor
    renderer = structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer()
    if pretty:
        processors.remove(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _welcome(settings: Settings, first_key: str | None) -> str:
    """Where it is, the first key when it was just made, and a tour that can be pasted as it is once KEY is right."""
    if first_key is not None:
        about = f"The first API key, with all scopes. It is shown only this once, keep it:\n\n  {first_key}"
        key = first_key
    elif settings.admin_key is not None:
        about = "The first API key is the value of CODE_SESSIONS_ADMIN_KEY."
        key = '"$CODE_SESSIONS_ADMIN_KEY"'
    else:
        about = f"The first API key was shown at the first start. `{sys.argv[0]} keys` lists, makes and revokes keys."
        key = "your-key"
    return f"""
Code Sessions listens on {settings.origin} ({settings.runtime} runtime)

{about}

A short tour to paste into a shell:

  export API={settings.origin}/api/v1
  export KEY={key}
  api() {{ curl -sS -H "X-API-Key: $KEY" -H 'Content-Type: application/json' "$@"; }}
  SESSION=$(api $API/code-sessions -d '{{"projectName": "hello", "projectDescription": "A first look"}}' |
    sed 's/.*"sessionId":"\\([^"]*\\)".*/\\1/')
  api $API/code-sessions/$SESSION/input -d '{{"text": "echo Hello from $(hostname)\\n"}}'
  sleep 1; api $API/code-sessions/$SESSION/output
  api -X DELETE $API/code-sessions/$SESSION

README.md goes on from there: the output loop, deploying, Docker.
"""

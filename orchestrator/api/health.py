"""`/healthz`: the process is up. `/readyz`: what it depends on answers."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import structlog
from aiohttp import web

from orchestrator.api.auth import public
from orchestrator.api.body import json_response
from orchestrator.errors import NotReady

Check = Callable[[], Awaitable[object]]

CHECK_TIMEOUT_S: Final = 2.0
_REMEMBERED_S: Final = 0.5  # nobody needs a key to ask, so asking often must not cost the store and the engine anything

_log = structlog.get_logger(__name__)


def health_routes(checks: Mapping[str, Check]) -> list[web.RouteDef]:
    """Routes for `app.add_routes`. A check passes when its awaitable ends without an exception within 2 seconds."""
    readiness = _Readiness(checks)

    @public
    async def healthz(_request: web.Request) -> web.Response:
        return json_response({"status": "ok"})

    @public
    async def readyz(_request: web.Request) -> web.Response:
        results = await readiness.results()
        failed = [str(result["name"]) for result in results if not result["ok"]]
        if failed:
            raise NotReady(f"Not answering: {', '.join(failed)}.", checks=results)
        return json_response({"status": "ok", "checks": results})

    return [web.get("/healthz", healthz), web.get("/readyz", readyz)]


class _Readiness:
    """Runs all checks at once, and once for all who ask at the same time."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks
        self._lock = asyncio.Lock()
        self._results: list[dict[str, str | int | bool]] = []
        self._fresh_until_s = 0.0

    async def results(self) -> list[dict[str, str | int | bool]]:
        async with self._lock:
            if time.monotonic() >= self._fresh_until_s:
                runs = (_run(name, check) for name, check in self._checks.items())
                self._results = list(await asyncio.gather(*runs))
                self._fresh_until_s = time.monotonic() + _REMEMBERED_S
            return self._results


async def _run(name: str, check: Check) -> dict[str, str | int | bool]:
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            await check()
    except Exception as error:  # noqa: BLE001 - whatever a check raises is its answer
        _log.warning("readiness check failed", check=name, reason=f"{type(error).__name__}: {error}")
        ok = False
    else:
        ok = True
    return {"name": name, "ok": ok, "latencyMs": round((time.monotonic() - began_s) * 1000)}

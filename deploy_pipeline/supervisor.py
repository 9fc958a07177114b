"""Looking after the releases that serve on this machine: restarts with growing pauses, and orders."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import structlog
from redis.exceptions import RedisError

from deploy_pipeline.builders.base import Release, RunState
from deploy_pipeline.errors import DeployFailed, EngineUnavailable, StartFailed
from deploy_pipeline.jobs import App, Desired, Health
from deploy_pipeline.orders import Orders, Verb
from deploy_pipeline.releases import Releases
from deploy_pipeline.routing import Route, Routes, StoppedTarget
from deploy_pipeline.tasks import end_task

CRASH_WINDOW_S: Final = 300.0  # two crashes within it are a loop; so long after the last but one it counts as over
_LONGEST_PAUSE_S: Final = 60.0
_ELSEWHERE_S: Final = 20.0  # an order that no machine with the application's files has taken by then

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Watch:
    """What was seen of one release. Times are monotonic seconds."""

    window_s: float = CRASH_WINDOW_S
    restarts: int = 0  # since this release was first seen
    reason: str = ""  # of the last crash
    _crashes: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    _engine_restarts: int | None = None  # None: not seen yet
    _is_down: bool = False
    _not_before: float = 0.0

    def observe(self, state: RunState, now: float) -> bool:
        """Take in what the runtime says. Whether the release is to be started again now."""
        first = self._engine_restarts is None
        for _ in range(state.restarts - (self._engine_restarts or 0) if not first else 0):
            self._crashed(state, now)
        self._engine_restarts = state.restarts
        if state.running or state.restarting:
            self._is_down = False
            return False
        if not self._is_down:
            self._is_down = True
            self._not_before = now
            if not first:  # what ended while nobody looked, with the machine perhaps, is no crash of its own
                self._crashed(state, now)
                self._not_before = now + min(_LONGEST_PAUSE_S, 2.0 ** (len(self._recent(now)) - 1))
        return now >= self._not_before

    def started(self, now: float) -> None:
        """It was started again, or could not be: the next look decides."""
        self._is_down = False
        self._not_before = now

    def health(self, state: RunState, now: float) -> Health:
        if len(self._recent(now)) > 1:
            return Health.CRASH_LOOPING
        return Health.RUNNING if state.running else Health.RESTARTING

    def _crashed(self, state: RunState, now: float) -> None:
        self.restarts += 1
        self.reason = state.reason or self.reason or "it ended"
        self._crashes.append(now)

    def _recent(self, now: float) -> list[float]:
        return [at for at in self._crashes if now - at < self.window_s]


class Supervisor:
    """Only one for each machine. `round` and `obey` are called about every second."""

    def __init__(self, releases: Releases, routes: Routes, orders: Orders) -> None:
        self._releases, self._routes, self._orders = releases, routes, orders
        self._watches: dict[str, Watch] = {}  # by deployment id
        self._told: dict[str, tuple[Health, str, int]] = {}
        self._obeying: dict[str, asyncio.Task[None]] = {}  # by application id

    async def close(self) -> None:
        """Orders that are under way are carried out again by the next supervisor."""
        for task in list(self._obeying.values()):
            await end_task(task)

    async def round(self) -> None:
        """See how every release is that serves on this machine, start again what died, and tell."""
        routes = await self._routes.all()
        for name, route in routes.items():
            release = self._releases.load(route.app_id, route.deployment_id)
            if release is None or route.app_id in self._obeying:
                continue  # another machine's, or somebody is at it
            await self._releases.logs.copy(release)
            if isinstance(route.target, StoppedTarget):
                await self._tell(release, Health.STOPPED, "", 0)
            else:
                await self._look_after(name, release)
        served = {route.deployment_id for route in routes.values()}
        for gone in self._watches.keys() - served:
            del self._watches[gone]
        for gone in self._told.keys() - served:
            del self._told[gone]

    async def obey(self) -> None:
        """Begin to carry out what was ordered."""
        for app_id in [app_id for app_id, task in self._obeying.items() if task.done()]:
            task = self._obeying.pop(app_id)
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("deploy.order_failed", app=app_id, exc_info=error)
        for app in await self._orders.pending():
            if app.id not in self._obeying:
                self._obeying[app.id] = asyncio.create_task(self._obey(app))

    async def _look_after(self, name: str, release: Release) -> None:
        now = time.monotonic()
        watch = self._watches.setdefault(release.deployment_id, Watch())
        try:
            state = await self._releases.state(release)
            if watch.observe(state, now):
                watch.started(now)
                await self._start(name, release)
        except DeployFailed as error:
            state = RunState(running=False)
            watch.reason = str(error)
        await self._tell(release, watch.health(state, now), watch.reason, watch.restarts)

    async def _tell(self, release: Release, health: Health, reason: str, restarts: int) -> None:
        news = (health, reason, restarts)
        if self._told.get(release.deployment_id) != news:
            await self._orders.report(release.app_id, release.deployment_id, *news)
            self._told[release.deployment_id] = news

    async def _start(self, name: str, release: Release) -> None:
        """Start a release that does not run, and lead the traffic to it, unless another one took over."""
        target = await self._releases.start_again(release)
        route = Route(app_id=release.app_id, deployment_id=release.deployment_id, target=target)
        if not await self._routes.move(name, route):
            await self._releases.stop(release)

    async def _obey(self, app: App) -> None:
        """Carry out the last order. What cannot be reached now is tried again."""
        try:
            if app.desired is Desired.REMOVED:
                await self._remove(app)
                return
            release = self._releases.load(app.id, app.current_deployment_id)
            if release is None:
                if time.time() - app.ordered_at / 1000 > _ELSEWHERE_S:
                    await self._orders.obeyed(app, "No worker has the files of the release that is to serve.")
                return
            try:
                await self._carry_out(Verb(app.order), app, release)
            except DeployFailed as error:
                await self._orders.obeyed(app, str(error))
            else:
                await self._orders.obeyed(app)
        except (RedisError, OSError, EngineUnavailable) as error:
            _log.warning("deploy.order_waits", app=app.id, order=app.order, error=str(error))

    async def _carry_out(self, verb: Verb, app: App, release: Release) -> None:
        stopped = Route(app_id=app.id, deployment_id=release.deployment_id, target=StoppedTarget())
        if verb is Verb.STOP:
            if await self._routes.move(app.name, stopped):
                await self._releases.stop(release)
                await self._tell(release, Health.STOPPED, "", 0)
            return
        self._watches.pop(release.deployment_id, None)  # what it did before is forgiven
        if verb is Verb.RESTART:
            await self._releases.stop(release)
        elif (await self._releases.state(release)).running:
            route = await self._routes.get(app.name)
            if route is not None and not isinstance(route.target, StoppedTarget):
                return
        await self._start(app.name, release)
        route = await self._routes.get(app.name)
        if route is None or route.deployment_id != release.deployment_id:
            raise StartFailed("Another release took over.")
        await self._releases.wait_until_healthy(release, route.target)
        await self._tell(release, Health.RUNNING, "", 0)

    async def _remove(self, app: App) -> None:
        if app.active_deployment_id:
            return  # it is being cancelled
        await self._releases.remove_app(app.id, name=app.name)
        await self._orders.forget(app)

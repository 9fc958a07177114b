"""Releases of applications: made from an archive, started beside the old one, swapped in when they answer."""

import asyncio
import shutil
import time
from pathlib import Path
from typing import Final

import aiohttp

from deploy_pipeline.app_logs import AppLogs
from deploy_pipeline.archive import ArchiveStore, extract
from deploy_pipeline.builders.base import BuildLog, Release, RunState, Runtime
from deploy_pipeline.detect import detect
from deploy_pipeline.errors import StartFailed
from deploy_pipeline.jobs import App, Deployment
from deploy_pipeline.logs import LogStore
from deploy_pipeline.orders import Orders
from deploy_pipeline.routing import HttpTarget, Route, Routes, Target

HEALTHY_WITHIN_S: Final = 60.0
KEPT_RELEASES: Final = 3
# Longer than a gateway trusts a lookup, so that no request is led to a release that is being stopped.
DRAIN_S: Final = 30.0
_CHECK_INTERVAL_S: Final = 1.0
_FIRST_CHECKS_S: Final = 0.1  # most applications are up within a second: do not make them wait for the interval
_CHECK_TIMEOUT_S: Final = 5.0
_SERVER_ERROR: Final = 500


class Releases:
    """All releases below one folder, `apps_dir/<app id>/<deployment id>/`."""

    def __init__(
        self,
        runtime: Runtime,
        routes: Routes,
        orders: Orders,
        logs: LogStore,
        archives: ArchiveStore,
        apps_dir: Path,
        *,
        healthy_within_s: float = HEALTHY_WITHIN_S,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._runtime, self._routes, self._archives, self._apps_dir = runtime, routes, archives, apps_dir
        self._orders, self.logs = orders, AppLogs(logs, runtime)
        self._healthy_within_s, self._drain_s = healthy_within_s, drain_s

    async def prepare(self, deployment: Deployment, app: App) -> Release:
        """Unpack the archive into a fresh folder and find out what it is.

        What an earlier worker left of this deployment is ended and removed first.

        Raises:
            ArchiveRefused, NotDeployable: with the reason.
        """
        await self.discard(deployment.app_id, deployment.id)
        folder = self._apps_dir / deployment.app_id / deployment.id
        async with self._archives.local(deployment.archive_sha256) as archive:
            await asyncio.to_thread(extract, archive, folder / "src", self._archives.limits)
        plan = await asyncio.to_thread(detect, folder / "src")
        release = Release(
            app_id=app.id,
            app_name=app.name,
            deployment_id=deployment.id,
            archive_sha256=deployment.archive_sha256,
            folder=folder,
            plan=plan,
            settings_version=app.settings_version,
        )
        await asyncio.to_thread(release.save)
        return release

    async def build(self, release: Release, log: BuildLog) -> Release:
        """The release as it was built. Raises NotDeployable and BuildFailed, with the reason."""
        await self._runtime.build(release, log)
        built = release.model_copy(update={"image": await self._runtime.image_of(release)})
        await asyncio.to_thread(built.save)
        return built

    async def again(self, deployment: Deployment) -> Release:
        """The kept release that a rollback goes back to, under the rollback's own id.

        Raises:
            StartFailed: it is not there any more.
        """
        await self.discard(deployment.app_id, deployment.id)
        kept = self.load(deployment.app_id, deployment.rollback_of)
        if kept is None:
            raise StartFailed("The files of that release are gone.")
        folder = self._apps_dir / deployment.app_id / deployment.id
        folder.mkdir(parents=True)
        changes = {"deployment_id": deployment.id, "folder": folder, "built_in": kept.built, "healthy_at": 0}
        release = kept.model_copy(update=changes)
        await asyncio.to_thread(release.save)
        return release

    async def start(self, release: Release) -> Target:
        """Start the release and wait until it answers; the old one serves meanwhile.

        Raises:
            StartFailed: it ended, or does not answer, with the reason; it may still run.
        """
        async with self.logs.following(release):
            target = await self._runtime.start(release, await self._env_of(release))
            await self.wait_until_healthy(release, target)
            return target

    async def swap(self, release: Release, target: Target, *, token: int) -> bool:
        """Lead the traffic to the release. False when somebody with a later claim has done so already."""
        await self._runtime.settle(release)
        healthy = release.model_copy(update={"healthy_at": time.time_ns() // 1_000_000})
        await asyncio.to_thread(healthy.save)
        route = Route(app_id=release.app_id, deployment_id=release.deployment_id, target=target)
        return await self._routes.set(release.app_name, route, token=token)

    async def retire_older(self, serving: Release) -> None:
        """After a swap: stop the releases that served before, once no gateway leads to them, and keep only the files
        of the last healthy ones. One that is being made meanwhile is not touched."""
        await asyncio.sleep(self._drain_s)
        healthy = self._healthy(serving.app_id)
        for release in healthy:
            if release.deployment_id == serving.deployment_id:
                break
            await self.retire(release.app_id, release.deployment_id)

    async def discard(self, app_id: str, deployment_id: str) -> None:
        """Leave nothing of a release: no process, container, image of its own, or file."""
        kept = [release for release in self._kept(app_id) if release.deployment_id != deployment_id]
        await self._runtime.discard(app_id, deployment_id, kept=kept)
        folder = self._apps_dir / app_id / deployment_id
        if any(release.built_in == folder for release in self._releases_of(app_id)):
            (folder / "release.json").unlink(missing_ok=True)  # the files go with the last release that runs them
        else:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def remove_app(self, app_id: str, *, name: str = "") -> None:
        """Leave nothing of an application, `name` being its first label in the URL if it is known."""
        name = name or next((release.app_name for release in self._releases_of(app_id)), "")
        if name:
            await self._routes.remove(name)
        running = {deployment_id for owner, deployment_id in await self._runtime.running() if owner == app_id}
        for deployment_id in running | {folder.name for folder in self._folders(app_id)}:
            await self.discard(app_id, deployment_id)
        await self._runtime.remove_app(app_id)
        await asyncio.to_thread(shutil.rmtree, self._apps_dir / app_id, ignore_errors=True)

    async def log_tail(self, release: Release) -> list[str]:
        return await self._runtime.log_tail(release)

    async def start_again(self, release: Release) -> Target:
        """Start a release that had served and does not run; returns before it listens.

        Raises:
            StartFailed: it could not even be started.
        """
        target = await self._runtime.start(release, await self._env_of(release))
        await self._runtime.settle(release)
        return target

    async def state(self, release: Release) -> RunState:
        return await self._runtime.state(release)

    async def stop(self, release: Release) -> None:
        """End what runs of it; its files stay."""
        await self._runtime.stop(release.app_id, release.deployment_id)
        await self.logs.copy(release)

    def load(self, app_id: str, deployment_id: str) -> Release | None:
        """None when it is not on this machine."""
        return Release.load(self._apps_dir / app_id / deployment_id)

    async def known(self) -> set[tuple[str, str]]:
        """(app id, deployment id) of everything that has a process, a container or a folder here."""
        folders = {(path.parent.name, path.name) for path in self._apps_dir.glob("app_*/dep_*")}
        return folders | await self._runtime.running()

    def archives(self) -> set[str]:
        """The SHA-256 of every archive that a release here was made from."""
        found = [Release.load(path) for path in self._apps_dir.glob("app_*/dep_*")]
        return {release.archive_sha256 for release in found if release is not None}

    async def serving(self) -> set[str]:
        """The deployment ids that routes lead to."""
        return {route.deployment_id for route in (await self._routes.all()).values()}

    async def routed_apps(self) -> set[str]:
        """The ids of all applications that have a release, on this machine or another."""
        return {route.app_id for route in (await self._routes.all()).values()}

    async def retire(self, app_id: str, deployment_id: str) -> None:
        """End a release that should not run any more; its files stay when it is one of those to go back to."""
        release = Release.load(self._apps_dir / app_id / deployment_id)
        if release is not None:
            await self.logs.copy(release)
        if any(release.deployment_id == deployment_id for release in self._kept(app_id)):
            await self._runtime.stop(app_id, deployment_id)
        else:
            await self.discard(app_id, deployment_id)

    def _folders(self, app_id: str) -> list[Path]:
        return list((self._apps_dir / app_id).glob("dep_*"))

    def _healthy(self, app_id: str) -> list[Release]:
        """Releases that were healthy once, the oldest first."""
        healthy = [release for release in self._releases_of(app_id) if release.healthy_at]
        return sorted(healthy, key=lambda release: release.healthy_at)

    def _releases_of(self, app_id: str) -> list[Release]:
        found = [Release.load(folder) for folder in self._folders(app_id)]
        return [release for release in found if release is not None]

    async def _env_of(self, release: Release) -> dict[str, str]:
        return await self._orders.env(release.app_id, release.settings_version)

    def _kept(self, app_id: str) -> list[Release]:
        """The last healthy releases, whose files stay to go back to."""
        return self._healthy(app_id)[-KEPT_RELEASES:]

    async def wait_until_healthy(self, release: Release, target: Target) -> None:
        """Any answer below 500 on its port will do.

        Raises:
            StartFailed: it ended, or does not answer.
        """
        if not isinstance(target, HttpTarget):
            return
        began = time.monotonic()
        seen = "nothing listens on the port in PORT"
        timeout = aiohttp.ClientTimeout(total=_CHECK_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            while time.monotonic() - began < self._healthy_within_s:
                seen = await _check(session, target, release.plan.health_path) or ""
                # After the check: an answer counts only from a release that is still there to give it.
                state = await self._runtime.state(release)
                if not state.running:
                    raise StartFailed(f"The application did not stay up: {state.reason}.")
                if not seen:
                    return
                early = time.monotonic() - began < _CHECK_INTERVAL_S
                await asyncio.sleep(_FIRST_CHECKS_S if early else _CHECK_INTERVAL_S)
        raise StartFailed(
            f"The application did not answer within {self._healthy_within_s:.0f} s: {seen}. It has to listen for HTTP "
            "on the port in the environment variable PORT."
        )


async def _check(session: aiohttp.ClientSession, target: HttpTarget, path: str) -> str | None:
    """None when it is healthy, else what was seen."""
    try:
        async with session.get(f"http://{target.host}:{target.port}{path}", allow_redirects=False) as answer:
            return f"{path} answered with status {answer.status}" if answer.status >= _SERVER_ERROR else None
    except aiohttp.ClientConnectorError:
        return "nothing listens on the port in PORT"
    except TimeoutError:
        return f"{path} took longer than {_CHECK_TIMEOUT_S:.0f} s to answer"
    except (aiohttp.ClientError, OSError) as error:
        return f"{path} gave no valid answer ({type(error).__name__})"

"""The queue of deployments in Redis: one in progress and one waiting for each application, leases with a fence.

The application's hash says what is to be done and who holds the lease; it is changed only by `queue.lua`. The two
streams (one for each `Stage`) only carry the news to whoever is free: an entry that got lost is written again by
`sweep`, and one too many finds nothing to claim. So no crash between two steps can lose or double a deployment.
"""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack

from redis.exceptions import RedisError, ResponseError

from deploy_pipeline.errors import AppIsRemoved, CancelRequested, ForbiddenChange, LostClaim
from deploy_pipeline.jobs import (
    REASON_CHARACTERS,
    SETTLED,
    Deployment,
    DeploymentState,
    Stage,
    app_id_of_deployment,
    app_id_of_session,
    app_name,
    log_tail_of,
    new_deployment_id,
    sources_of,
)
from deploy_pipeline.records import app_key, organization_key, text_of
from deploy_pipeline.steps import BUSY_APPS, GROUP, Steps, stream_key

if TYPE_CHECKING:
    from redis.asyncio import Redis

LEASE_S: Final = 10.0  # renew at a third of it
SWEEP_INTERVAL_S: Final = 5.0  # with LEASE_S: a dead consumer's job is announced again within 15 s
MAX_ATTEMPTS: Final = 3
IDEMPOTENCY_S: Final = 24 * 3600
_CANCEL_LOOK_S: Final = 0.5  # how soon who works on a deployment notices that it is to be cancelled
EXHAUSTED: Final = f"Given up after {MAX_ATTEMPTS} attempts: each time the process that worked on it died."
_PENDING_IDLE_MS: Final = 10_000  # an entry that was read but not claimed for so long: its reader died in between


class Facts(TypedDict, total=False):
    """What becomes known of a deployment on its way."""

    reason: str
    log_tail: list[str]
    archive_sha256: str
    archive_bytes: int
    kind: str
    url: str
    settings_version: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on one deployment, until its lease runs out (`LEASE_S` after it was taken or renewed)."""

    deployment: Deployment  # as it was when it was taken
    stage: Stage
    token: int  # the fence: a later claim has a higher one
    attempt: int  # from 1; more than 1: an earlier consumer died over it

    @property
    def exhausted(self) -> bool:
        """Not to be tried again: it ended its consumers too often."""
        return self.attempt > MAX_ATTEMPTS

    @property
    def app_id(self) -> str:
        return self.deployment.app_id

    @property
    def deployment_id(self) -> str:
        return self.deployment.id


@dataclass(frozen=True, slots=True)
class Finished:
    """What ending a deployment brought about; empty strings for nothing."""

    activated: str  # the deployment that waited and is now in progress
    replaced: str  # the deployment that served until now


@dataclass(frozen=True, slots=True)
class Submitted:
    deployment: Deployment
    body_hash: str  # of the request that made it: another one than the caller's means that the key was used before


class DeploymentQueue(Steps):
    """Deployments and applications in Redis. Any call may raise redis-py's `RedisError`; then nothing is half done
    that `sweep` does not repair.

    `redis` is a client made with `decode_responses=False` whose socket timeout is longer than any `block_s`.
    """

    def __init__(self, redis: "Redis", *, lease_s: float = LEASE_S) -> None:
        super().__init__(redis)
        self._lease_ms = int(lease_s * 1000)

    # What the API asks

    async def submit(
        self,
        *,
        session_id: str,
        workspace_id: str,
        organization_id: str,
        user_id: str,
        project_name: str,
        request_key: str = "",
        body_hash: str = "",
    ) -> Submitted:
        """Record a deployment of the session's workspace and queue it.

        It is in progress at once when none of the application is; else it waits, and the one that waited before it
        is superseded. The application is made with the session's first deployment. A `request_key` that was used for
        the session in the last `IDEMPOTENCY_S` gives the deployment of then and does nothing.

        Raises:
            AppIsRemoved: the application is being removed.
        """
        app_id = app_id_of_session(session_id)
        app = {
            "id": app_id,
            "session_id": session_id,
            "organization_id": organization_id,
            "project_name": project_name,
            "name": app_name(project_name, app_id),
        }
        deployment = {
            "id": new_deployment_id(app_id),
            "app_id": app_id,
            "session_id": session_id,
            "workspace_id": workspace_id,
            "organization_id": organization_id,
            "user_id": user_id,
        }
        # Before the script: an entry for an application that was not made after all is ignored, a missing one is not.
        await self._redis.sadd(BUSY_APPS, app_id)
        await self._redis.zadd(organization_key(organization_id), {app_id: await self._now_ms()}, nx=True)
        fields = [item for pair in (*app.items(), *deployment.items()) for item in pair]
        options = (request_key, str(IDEMPOTENCY_S), body_hash, str(len(app) * 2))
        new, raw_id, raw_hash = await self._run(app_id, "submit", deployment["id"], *options, *fields)
        if new < 0:
            raise AppIsRemoved(app_id)
        deployment_id = text_of(raw_id)
        if new:
            await self._announce(app_id, deployment_id, Stage.ARCHIVE)
        return Submitted(await self.just_made(deployment_id), text_of(raw_hash))

    async def submitted(self, organization_id: str, session_id: str, request_key: str) -> Submitted | None:
        """What an earlier request with this key has made; None when there was none."""
        app_id = app_id_of_session(session_id)
        fields = await self._hash(f"{app_key(app_id)}:asked:{request_key}") if request_key else {}
        deployment = await self.get(organization_id, fields["id"]) if fields else None
        return Submitted(deployment, fields["body"]) if deployment is not None else None

    async def request_cancel(self, deployment_id: str) -> None:
        """Have a deployment cancelled. One of which nothing runs is `cancelled` at once; else that is said by whoever
        works on it, or takes it over, when all that ran for it is gone. Nothing changes for a settled one."""
        app_id = app_id_of_deployment(deployment_id)
        if app_id is None:
            return
        outcome, activated, stage = await self._run(app_id, "cancel", deployment_id)
        if outcome == b"unserved":
            await self._announce(app_id, deployment_id, Stage(text_of(stage)))
        if activated:
            await self._announce(app_id, text_of(activated), Stage.ARCHIVE)

    # What the consumers of a stage do

    async def take(self, stage: Stage, consumer: str, *, block_s: float) -> Claim | None:
        """The next job of a stage, waiting up to `block_s` seconds for one; None when there was none.

        A job of the archive stage whose consumers died `MAX_ATTEMPTS` times ends as failed here, and one that is to be
        cancelled as cancelled: they left nothing behind. Those of the build stage are the consumer's to clear away.
        """
        entry = await self._read(stage, consumer, block_s)
        if entry is None:
            return None
        entry_id, deployment_id = entry
        claim = await self._claim(stage, consumer, deployment_id)
        # Only now: a reader that dies before this leaves the entry pending, and another one gets it.
        # Deleted first: an entry that was acknowledged but is still there would tell the sweep that all is well.
        await self._redis.xdel(stream_key(stage), entry_id)
        await self._redis.xack(stream_key(stage), GROUP, entry_id)
        if claim is None or stage is not Stage.ARCHIVE:
            return claim
        if claim.deployment.cancel_requested:
            await self.finish(claim, DeploymentState.CANCELLED)
        elif claim.exhausted:
            await self.finish(claim, DeploymentState.FAILED, reason=EXHAUSTED)
        else:
            return claim
        return None

    async def renew(self, claim: Claim) -> None:
        """Hold the lease for another `LEASE_S`.

        Raises:
            LostClaim: somebody else has the job, or it was ended.
            CancelRequested: it is to be cancelled; the lease is held all the same.
        """
        outcome = await self._run(claim.app_id, "renew", claim.deployment_id, str(claim.token), str(self._lease_ms))
        _check(outcome, claim, claim.deployment.state)

    async def hold(self, claim: Claim) -> None:
        """Hold the lease until cancelled. A store out of reach for a moment is no reason to throw work away.

        Raises:
            LostClaim, CancelRequested: as `renew`, within a second.
        """
        renewed_at = time.monotonic()
        while True:
            await asyncio.sleep(min(_CANCEL_LOOK_S, self._lease_ms / 3000))
            with contextlib.suppress(RedisError, OSError):
                record = f"{app_key(claim.app_id)}:{claim.deployment_id}"
                asked = await self._redis.hget(record, "cancel_requested")
                if (asked and asked != b"0") or time.monotonic() - renewed_at >= self._lease_ms / 3000:
                    await self.renew(claim)
                    renewed_at = time.monotonic()

    async def release(self, claim: Claim) -> None:
        """Give an unfinished job back, for another consumer to take at once. A lost claim is ignored."""
        if await self._run(claim.app_id, "release", claim.deployment_id, str(claim.token)):
            await self._announce(claim.app_id, claim.deployment_id, claim.stage)

    async def advance(self, claim: Claim, to_state: DeploymentState, **facts: Unpack[Facts]) -> None:
        """Record the next state, or more facts in the same one. `BUILDING` ends a claim of the archive stage: the
        job goes to the build stream.

        Raises:
            LostClaim: somebody else has the job, or it was ended.
            CancelRequested: it is to be cancelled, and was not advanced.
            ForbiddenChange: the table has no such change.
        """
        handed_over = claim.stage is Stage.ARCHIVE and to_state is DeploymentState.BUILDING
        stage = Stage.BUILD.value if handed_over else ""
        outcome = await self._change("advance", claim, to_state, stage, facts)
        _check(outcome, claim, to_state)
        if handed_over:
            await self._announce(claim.app_id, claim.deployment_id, Stage.BUILD)

    async def finish(self, claim: Claim, to_state: DeploymentState, **facts: Unpack[Facts]) -> Finished:
        """End the job in a settled state: the application's next deployment starts, if one waits.

        With `RUNNING`, the deployment that served until now becomes `REPLACED`.

        Raises:
            LostClaim: somebody else has the job, or it was ended.
            ForbiddenChange: the table has no such change.
        """
        if to_state not in SETTLED:
            raise ForbiddenChange(f"{to_state} does not end a deployment")
        outcome, activated, replaced = await self._change("finish", claim, to_state, "", facts)
        _check(outcome, claim, to_state)
        if activated:
            await self._announce(claim.app_id, activated.decode(), Stage.ARCHIVE)
        return Finished(activated.decode(), replaced.decode())

    async def sweep(self) -> int:
        """Announce again what nobody works on and no stream entry speaks of; to be called every `SWEEP_INTERVAL_S`
        by any number of processes. Returns how many were announced.
        """
        announced = 0
        for raw in await self._redis.smembers(BUSY_APPS):
            app_id = text_of(raw)
            work = await self._run(app_id, "unserved")
            if work is None:
                # Removed before the second look: a deployment that is submitted in between is not forgotten.
                await self._redis.srem(BUSY_APPS, app_id)
                work = await self._run(app_id, "unserved")
                if work is None:
                    continue
                await self._redis.sadd(BUSY_APPS, app_id)
            if not work:
                continue
            deployment_id, stage, entry = (part.decode() for part in work)
            if entry and await self._redis.xrange(stream_key(Stage(stage)), entry, entry):
                continue
            await self._announce(app_id, deployment_id, Stage(stage))
            announced += 1
        return announced

    async def archives_in_progress(self) -> set[str]:
        """The SHA-256 of every archive that a deployment in progress needs."""
        found = set()
        for raw in await self._redis.smembers(BUSY_APPS):
            app = await self.find_app(text_of(raw))
            deployment = await self.find(app.active_deployment_id) if app is not None else None
            if deployment is not None:
                found.add(deployment.archive_sha256)
        return found

    # Below the surface

    async def _read(self, stage: Stage, consumer: str, block_s: float) -> tuple[bytes, str] | None:
        """A stream entry for this consumer: first one that a dead reader left behind, then a new one."""
        key = stream_key(stage)
        await self._ensure_group(stage)
        try:
            _, abandoned, *_ = await self._redis.xautoclaim(
                key, GROUP, consumer, min_idle_time=_PENDING_IDLE_MS, start_id="0-0", count=1
            )
            if abandoned:
                return _entry(abandoned[0])
            # Zero would mean "for ever" to Redis.
            answer = await self._redis.xreadgroup(
                GROUP, consumer, {key: ">"}, count=1, block=max(1, int(block_s * 1000))
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._groups.discard(stage)  # the store was emptied under us: made again at the next call
            return None
        if not answer:
            return None
        streams = list(answer.values()) if isinstance(answer, dict) else [entries for _, entries in answer]
        return _entry(_flat(streams[0]))

    async def _claim(self, stage: Stage, consumer: str, deployment_id: str) -> Claim | None:
        app_id = app_id_of_deployment(deployment_id)
        if app_id is None:
            return None
        answer = await self._run(app_id, "claim", deployment_id, stage.value, consumer, str(self._lease_ms))
        if answer is None:
            return None
        token, attempt, flat = answer
        values = [value.decode() for value in flat]
        fields = dict(zip(values[::2], values[1::2], strict=True))
        return Claim(Deployment.from_hash(fields), stage, int(token), int(attempt))

    async def _change(self, step: str, claim: Claim, to_state: DeploymentState, stage: str, facts: Facts) -> Any:
        sources = "".join(f",{state}" for state in sources_of(to_state)) + ","
        pairs = [item for pair in _as_fields(facts).items() for item in pair]
        return await self._run(
            claim.app_id, step, claim.deployment_id, str(claim.token), to_state.value, sources, stage, *pairs
        )


def _as_fields(facts: Facts) -> dict[str, str]:
    fields = {name: str(value) for name, value in facts.items() if name != "log_tail"}
    if "reason" in facts:
        fields["reason"] = facts["reason"][:REASON_CHARACTERS]
    if "log_tail" in facts:
        fields["log_tail"] = json.dumps(log_tail_of(facts["log_tail"]))
    return fields


def _check(outcome: Any, claim: Claim, to_state: DeploymentState) -> None:
    if outcome == b"lost":
        raise LostClaim(claim.deployment_id)
    if outcome == b"cancel":
        raise CancelRequested(claim.deployment_id)
    if outcome != b"ok":
        raise ForbiddenChange(f"{claim.deployment_id}: {outcome.decode()} to {to_state}")


def _flat(entries: Any) -> Any:
    """redis-py 8 nests a stream's entries one list deeper under RESP3 than under RESP2."""
    first = entries[0]
    return first[0] if isinstance(first, list) else first


def _entry(raw: Any) -> tuple[bytes, str]:
    entry_id, fields = raw[0], raw[1]
    return entry_id, fields[b"deployment"].decode()

"""Sessions in a real Valkey: tenancy, pages, and a lifecycle that only moves forward."""

import asyncio

import pytest

from orchestrator.errors import InvalidRequest, SessionNotFound
from orchestrator.models import ALLOWED, Session, SessionStatus
from orchestrator.sessions.lifecycle import safe_dir_name
from orchestrator.sessions.registry import SessionRegistry


@pytest.fixture
def registry(redis):
    return SessionRegistry(redis)


def session(number, *, organization="org_one", created=None):
    name = f"cs_{'abcdefghijklmnopqrstuvwxyz'[number % 26]}{number:04d}"
    at = 1000 + number if created is None else created
    return Session(
        name, f"ws_{number}", organization, "user_x", "Näme", "", "name", SessionStatus.CREATING, at, at, "hash"
    )


async def test_a_session_is_found_in_its_own_organization_only(registry):
    one = session(1)
    await registry.add(one)
    assert await registry.get("org_one", one.id) == one
    with pytest.raises(SessionNotFound):
        await registry.get("org_two", one.id)
    assert (await registry.page("org_two", status=None, limit=10, cursor="")) == ([], None)


@pytest.mark.parametrize("unknown", ["cs_nosuch", "", "x", "../cs_a", "cs_a:session", "cs_{a}", "cs_" + "a" * 300])
async def test_what_is_no_id_of_a_session_is_not_found(registry, unknown):
    with pytest.raises(SessionNotFound):
        await registry.get("org_one", unknown)


@pytest.mark.parametrize("same_moment", [False, True])
async def test_pages_go_through_all_sessions_newest_first_each_once(registry, same_moment):
    sessions = [session(number, created=5000 if same_moment else None) for number in range(250)]
    for one in sessions:
        await registry.add(one)
    seen, cursor = [], ""
    while cursor is not None:
        page, cursor = await registry.page("org_one", status=None, limit=7, cursor=cursor)
        assert len(page) <= 7
        seen += page
    assert [one.id for one in seen] == [
        one.id for one in sorted(sessions, key=lambda one: (one.created_at_ms, one.id), reverse=True)
    ]


async def test_pages_of_one_status_have_no_others(registry):
    for number in range(30):
        await registry.add(session(number))
        if number % 3 == 0:
            await registry.move(session(number).id, SessionStatus.RUNNING)
    page, cursor = await registry.page("org_one", status=SessionStatus.RUNNING, limit=10, cursor="")
    assert len(page) == 10
    assert cursor is None
    assert {one.status for one in page} == {SessionStatus.RUNNING}


@pytest.mark.parametrize("cursor", ["x", "////", "MTIz", "é", "OTk6eA"])
async def test_a_cursor_that_was_never_given_is_refused(registry, cursor):
    with pytest.raises(InvalidRequest, match="cursor"):
        await registry.page("org_one", status=None, limit=1, cursor=cursor)


@pytest.mark.parametrize("at", SessionStatus)
@pytest.mark.parametrize("to", SessionStatus)
async def test_a_status_moves_along_the_table_only(registry, redis, at, to):
    one = session(1)
    await registry.add(one)
    await redis.hset(f"cs:{{{one.id}}}:session", "status", at)
    moved = await registry.move(one.id, to, reason="why")
    assert moved is (to in ALLOWED[at])
    found = await registry.get("org_one", one.id)
    assert found.status is (to if moved else at)
    assert found.status_reason == ("why" if moved else "")


async def test_only_one_of_many_decides_how_a_session_ends(registry):
    one = session(1)
    await registry.add(one)
    ends = [SessionStatus.COMPLETED, SessionStatus.FAILED] * 10
    decided = await asyncio.gather(*(registry.begin_end(one.id, end, reason=end) for end in ends))
    assert decided.count(True) == 1
    found = await registry.get("org_one", one.id)
    assert found.ended
    assert found.ending_as is ends[decided.index(True)]


async def test_a_session_is_live_until_it_has_ended(registry):
    one = session(1)
    await registry.add(one)
    assert await registry.live_ids() == {one.id}
    await registry.move(one.id, SessionStatus.RUNNING)
    assert await registry.live_ids() == {one.id}
    await registry.move(one.id, SessionStatus.COMPLETED)
    assert await registry.live_ids() == set()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("marketing-site", "marketing-site"),
        ("My site!", "My-site"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "project"),
        (".ssh", "ssh"),
        ("-rf", "rf"),
        ("😀", "project"),
        ("Café Zürich", "Cafe-Zurich"),
        ("a" * 100, "a" * 64),
        ("$(reboot) `x`", "reboot-x"),
    ],
)
def test_a_projects_folder_is_one_safe_name(name, folder):
    assert safe_dir_name(name) == folder

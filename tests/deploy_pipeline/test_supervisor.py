import pytest

from deploy_pipeline.builders.base import RunState
from deploy_pipeline.jobs import Health
from deploy_pipeline.supervisor import Watch

UP = RunState(running=True)
DOWN = RunState(running=False, reason="it ended with status 3")


def test_pauses_grow_while_it_goes_on_crashing_and_have_a_bound():
    watch, now, pauses = Watch(), 1000.0, []
    assert not watch.observe(UP, now)
    for _ in range(9):
        began = now = now + 1
        while not watch.observe(DOWN, now):
            now += 0.5
        pauses.append(now - began)
        watch.started(now)
    assert pauses[:7] == [1, 2, 4, 8, 16, 32, 60]
    assert max(pauses) == 60


def test_one_that_exits_every_minute_is_seen_as_crash_looping_from_its_second_end_on():
    watch, now = Watch(), 0.0
    seen = []
    for _ in range(3):
        watch.observe(UP, now)
        now += 61
        watch.observe(DOWN, now)
        seen.append(watch.health(DOWN, now))
        now += 5
        assert watch.observe(DOWN, now)
        watch.started(now)
    assert seen == [Health.RESTARTING, Health.CRASH_LOOPING, Health.CRASH_LOOPING]
    assert watch.health(UP, now) is Health.CRASH_LOOPING, "it is up for the moment"
    assert (watch.reason, watch.restarts) == ("it ended with status 3", 3)
    assert watch.health(UP, now + 301) is Health.RUNNING


def test_restarts_by_the_engine_count_and_are_left_to_it():
    watch = Watch()
    assert not watch.observe(RunState(running=True, restarts=5), 0)
    assert watch.health(UP, 0) is Health.RUNNING, "those were before anybody looked"
    restarting = RunState(running=False, reason="it ran out of memory", restarting=True, restarts=6)
    assert not watch.observe(restarting, 1)
    assert watch.health(restarting, 1) is Health.RESTARTING
    assert not watch.observe(RunState(running=True, restarts=7), 3)
    assert watch.health(UP, 3) is Health.CRASH_LOOPING
    assert (watch.reason, watch.restarts) == ("it ran out of memory", 2)


@pytest.mark.parametrize("now", [0.0, 1e6])
def test_what_ended_with_the_machine_is_started_at_once_and_is_no_crash(now):
    watch = Watch()
    assert watch.observe(DOWN, now)
    watch.started(now)
    watch.observe(UP, now + 1)
    assert (watch.health(UP, now + 1), watch.restarts) == (Health.RUNNING, 0)

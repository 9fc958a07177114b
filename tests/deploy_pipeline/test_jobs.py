import re

import pytest

from deploy_pipeline.jobs import (
    ALLOWED,
    SETTLED,
    Deployment,
    DeploymentState,
    app_id_of_deployment,
    app_id_of_session,
    app_name,
    is_app_id,
    new_deployment_id,
    public_status,
)


def test_every_state_has_a_row_in_the_table():
    assert set(ALLOWED) == set(DeploymentState)


def test_states_only_move_forward():
    def reachable(state, seen=()):
        assert state not in seen, f"a way back to {state}"
        for target in ALLOWED[state]:
            reachable(target, (*seen, state))

    for state in DeploymentState:
        reachable(state)


def test_everything_before_it_settled_is_called_deploying():
    assert {public_status(state) for state in set(DeploymentState) - SETTLED} == {"deploying"}
    assert public_status(DeploymentState.RUNNING) == "running"
    assert public_status(DeploymentState.SUPERSEDED) == "superseded"


def test_a_session_has_one_application_id_and_its_deployments_carry_it():
    app_id = app_id_of_session("cs_abc")
    assert is_app_id(app_id)
    assert app_id == app_id_of_session("cs_abc") != app_id_of_session("cs_abd")
    one, two = new_deployment_id(app_id), new_deployment_id(app_id)
    assert one != two
    assert app_id_of_deployment(one) == app_id_of_deployment(two) == app_id


@pytest.mark.parametrize(
    "text",
    ["", "dep_", "dep_" + "a" * 35, "app_" + "a" * 36, "dep_" + "a" * 35 + "}", "dep_" + "a" * 36 + "\n"],
)
def test_what_is_no_deployment_id_is_not_taken_for_one(text):
    assert app_id_of_deployment(text) is None


@pytest.mark.parametrize("name", ["marketing-site", "Café Ω!", "日本語", "-" * 100, "a" * 100, "..", "A b_c"])
def test_an_application_name_is_a_dns_label(name):
    label = app_name(name, app_id_of_session("cs_1"))
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])", label)


def test_a_deployment_survives_the_store():
    app_id = app_id_of_session("cs_1")
    deployment = Deployment(
        id=new_deployment_id(app_id),
        app_id=app_id,
        session_id="cs_1",
        workspace_id="ws_1",
        organization_id="org_1",
        user_id="user_1",
        state=DeploymentState.FAILED,
        reason="no",
        log_tail=["a", "ü"],
        archive_bytes=7,
        times={DeploymentState.QUEUED: 1, DeploymentState.FAILED: 2},
        created_at=1,
        updated_at=2,
    )
    assert Deployment.from_hash(deployment.to_hash()) == deployment

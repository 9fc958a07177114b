"""Types a command into terminado and reads its output; in a process of its own."""

import json
import time

from benchmarks.expected import Collected
from benchmarks.processes import answer, parameters
from benchmarks.websocket_connection import WebSocketConnection


class Terminado:
    """terminado's own protocol on top of a WebSocket."""

    def __init__(self, port):
        self._socket = WebSocketConnection(port, "/terminal")

    def send(self, text):
        self._socket.send_text(json.dumps(["stdin", text]))

    def receive(self):
        """The terminal's next output."""
        while True:
            kind, *rest = json.loads(self._socket.receive())
            if kind == "stdout":
                return rest[0]

    def run(self, command):
        self.send(f"{command}; echo rea''dy\n")
        text = ""
        while "ready\r\n" not in text:
            text += self.receive()

    def close(self):
        self._socket.close()


def main():
    asked = parameters()
    collected = Collected(**asked["expected"])
    terminal = Terminado(asked["port"])
    terminal.run("stty -echo; PS1=")
    began, cpu_before = time.perf_counter(), time.process_time()
    terminal.send(asked["command"] + "\n")
    while not collected.complete:
        collected.add(terminal.receive())
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_before
    collected.check()
    terminal.close()
    answer(took_s=took_s, cpu_s=cpu_s)


if __name__ == "__main__":
    main()

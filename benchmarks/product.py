"""The product as people run it: `code-sessions serve` on a data folder that goes afterwards."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.http_connection import Connection
from tests.end_to_end.docker_harness import DockerServe
from tests.end_to_end.harness import ADMIN_KEY, Serve

_KEEP_ALL_BYTES = 4 * 1024**3  # so that nothing is trimmed while it is measured
_READY_S = 30


class Product:
    """`connection` is for whoever sets up; measuring clients have connections of their own."""

    def __init__(self, serve):
        self.serve, self.port, self.key = serve, serve.port, ADMIN_KEY
        self.connection = Connection(self.port, self.key)

    def create(self, name="bench"):
        """A new session's id, without waiting for anything."""
        body = {"projectName": name, "projectDescription": "a benchmark's"}
        return self.connection.call("POST", "code-sessions", body)["sessionId"]

    def send(self, session, text):
        self.connection.call("POST", f"code-sessions/{session}/input", {"text": text})

    def run(self, session, command):
        """Type a command into a fresh shell and wait for it; the seq up to which its output was read."""
        self.send(session, f"{command}; echo rea''dy\n")
        text, after, deadline = "", 0, time.monotonic() + _READY_S
        while "ready\r\n" not in text:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer to {command!r}: {text!r}")
            answer = self.connection.call("GET", f"code-sessions/{session}/output?afterSeq={after}&wait=5")
            text += "".join(chunk["text"] for chunk in answer["chunks"])
            after = answer["lastSeq"]
        return after

    def last_seq(self, session):
        """The newest seq there is."""
        far = 2**40  # beyond it there is nothing, and then the answer tells the newest
        return self.connection.call("GET", f"code-sessions/{session}/output?afterSeq={far}")["lastSeq"]

    def delete(self, session):
        self.connection.call("DELETE", f"code-sessions/{session}")

    def end(self, session):
        """Delete it and wait until nothing of it runs."""
        self.delete(session)
        deadline = time.monotonic() + _READY_S
        while self.connection.call("GET", f"code-sessions/{session}")["status"] != "completed":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{session} does not end")
            time.sleep(0.05)

    def serve_process(self):
        return psutil.Process(self.serve.process.pid)

    def sidecars(self):
        """The local runtime's."""
        own = str(self.serve.data_dir)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[-2:] == ["-m", "sidecar"] and process.cwd().startswith(own):
                    found.append(process)
        return found


@contextlib.contextmanager
def product(*, docker=False, **settings):
    folder = Path(tempfile.mkdtemp(prefix="cs-bench-"))
    settings = {"CODE_SESSIONS_OUTPUT_RETENTION_BYTES": str(_KEEP_ALL_BYTES)} | settings
    serve = (DockerServe if docker else Serve)(folder / "data", **settings)
    (folder / "data").mkdir()
    try:
        serve.start()
        yield Product(serve)
    finally:
        try:
            serve.stop()
        except subprocess.TimeoutExpired as error:  # worth knowing, and no reason to lose what was measured
            print(f"== serve did not stop within {error.timeout:.0f} s: killed", file=sys.stderr)
        finally:
            serve.remove_all()
            serve.process.wait()
            shutil.rmtree(folder, ignore_errors=True)


def cpu_seconds(process):
    """What it and its ended children have used so far, in user and kernel mode."""
    return sum(process.cpu_times()[:4])


class CpuSeconds:
    """How much CPU time each named group of processes uses from here on."""

    def __init__(self, **groups):
        self._groups = groups
        self._before = self._now()

    def _now(self):
        return {name: sum(map(cpu_seconds, group)) for name, group in self._groups.items()}

    def used(self):
        return {name: value - self._before[name] for name, value in self._now().items()}

"""A real `code-sessions serve` in a process of its own, and a client that polls as the documents say."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import psutil

ADMIN_KEY = "test-admin-key-0123456789-0123456789-abcdef"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Serve:
    """`code-sessions serve` on ports that stay the same over restarts."""

    def __init__(self, data_dir: Path, **settings: str):
        self.data_dir = data_dir
        self.port, self.gateway_port = free_port(), free_port()
        self.settings = {
            "CODE_SESSIONS_DATA_DIR": str(data_dir),
            "CODE_SESSIONS_PORT": str(self.port),
            "CODE_SESSIONS_GATEWAY_PORT": str(self.gateway_port),
            "CODE_SESSIONS_ADMIN_KEY": ADMIN_KEY,
            **settings,
        }
        self.command = [str(Path(sys.executable).with_name("code-sessions")), "serve"]
        self.log = data_dir.parent / f"{data_dir.name}.log"
        self.process = None

    @property
    def origin(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self, timeout_s=30.0):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CODE_SESSIONS_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=environment | self.settings, stdout=log, stderr=log)
        deadline = time.monotonic() + timeout_s
        while "listens on" not in self.new_log():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return self

    def beside(self, command):
        """Another of the product's programs with the same settings, which the caller ends."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CODE_SESSIONS_")}
        with self.log.open("ab") as log:
            arguments = [self.command[0], command]
            return subprocess.Popen(arguments, env=environment | self.settings, stdout=log, stderr=log)

    def new_log(self):
        """What the running process has written."""
        text = self.log.read_text(errors="replace")
        return text[getattr(self, "_log_mark", 0) :]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._log_mark = len(self.log.read_text(errors="replace"))

    def stop(self, timeout_s=30.0):
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout_s)
        self._log_mark = len(self.log.read_text(errors="replace"))

    def restart(self):
        self.kill()
        return self.start()

    def client(self, key=ADMIN_KEY):
        return Client(self.origin, key)

    def store(self, timeout_s=10):
        """The embedded store's process."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    if process.name() == "valkey-server":
                        return process
            time.sleep(0.05)
        raise AssertionError("no store runs")

    def processes(self):
        """Every process that belongs to this data folder: store, sidecars, what they started, applications."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                texts = [*process.cmdline(), process.cwd(), *process.environ().values()]
                if process.pid != os.getpid() and any(str(self.data_dir) in text for text in texts):
                    found.append(process)
        return found

    def remove_all(self):
        """Whatever a failed test left behind."""
        for process in self.processes():
            process.kill()


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.raw = status, headers, body
        self.json = json.loads(body) if body and "json" in headers.get("Content-Type", "") else None

    def __repr__(self):
        return f"{self.status} {self.raw[:400]!r}"


class Client:
    """Plain REST; `output` is the polling loop of the documents, which only retries."""

    def __init__(self, origin, key):
        self.origin, self.key = origin, key
        self._http = None

    async def __aenter__(self):
        # A connection of its own for each call: one that a killed server left half-open says nothing of the product.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        self._http = aiohttp.ClientSession(headers={"X-API-Key": self.key} if self.key else {}, connector=connector)
        return self

    async def __aexit__(self, *_):
        await self._http.close()

    async def call(self, method, path, body=None, *, headers=None, data=None, timeout_s=60.0):
        url = self.origin + (path if path.startswith("/") else f"/api/v1/{path}")
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        skip = ["Content-Type"] if body is None else []
        async with self._http.request(
            method, url, json=body, data=data, headers=headers, timeout=timeout, skip_auto_headers=skip
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    async def create(self, name="demo", description="") -> "SessionClient":
        answer = await self.call("POST", "code-sessions", {"projectName": name, "projectDescription": description})
        assert answer.status == 201, answer
        return SessionClient(self, answer.json["sessionId"])


class SessionClient:
    def __init__(self, client, session_id):
        self.client, self.id, self.path = client, session_id, f"code-sessions/{session_id}"
        self.after, self.text = 0, ""
        self.seqs = []

    async def show(self):
        answer = await self.client.call("GET", self.path)
        assert answer.status == 200, answer
        return answer.json

    async def send(self, text, **headers):
        answer = await self.client.call("POST", f"{self.path}/input", {"text": text}, headers=headers)
        assert answer.status == 200, answer
        assert answer.json == {"sent": True, "bytes": len(text.encode())}

    async def poll(self, wait=2):
        """One turn of the polling loop."""
        answer = await self.client.call("GET", f"{self.path}/output?afterSeq={self.after}&wait={wait}")
        assert answer.status == 200, answer
        for chunk in answer.json["chunks"]:
            self.seqs.append(chunk["seq"])
            self.text += chunk["text"]
        self.after = answer.json["lastSeq"]
        return answer.json

    async def until(self, pattern, timeout_s=60):
        """Poll until the pattern stands in what came since the last call; the text up to it."""
        start = getattr(self, "_seen", 0)
        async with asyncio.timeout(timeout_s):
            try:
                while not (match := re.search(pattern, self.text[start:])):
                    await self.poll()
            except (TimeoutError, asyncio.CancelledError):
                print("waited for", pattern, "in", self.text[start:][-3000:])
                raise
        self._seen = start + match.end()
        return self.text[start : self._seen]

    async def run(self, command, timeout_s=60):
        """Type a command and wait for it; its output and exit status."""
        marker = f"end{len(self.seqs)}"
        await self.send(f"{command}\necho {marker[:2]}''{marker[2:]}=$?\n")
        text = await self.until(rf"{marker}=(\d+)", timeout_s)
        return text, int(text.rsplit("=", 1)[1])

    async def until_state(self, state, timeout_s=30):
        async with asyncio.timeout(timeout_s):
            while (shown := await self.show())["terminal"]["state"] != state:
                await asyncio.sleep(0.05)
        return shown

    async def until_status(self, status, timeout_s=30):
        async with asyncio.timeout(timeout_s):
            while (shown := await self.show())["status"] != status:
                await asyncio.sleep(0.05)
        return shown

    async def deploy(self, timeout_s=180):
        """Deploy and wait; the deployment's last answer."""
        answer = await self.client.call("POST", f"{self.path}/deploy")
        assert answer.status == 200, answer
        assert answer.json["status"] == "deploying"
        async with asyncio.timeout(timeout_s):
            while True:
                shown = await self.client.call("GET", f"deployments/{answer.json['deploymentId']}")
                if shown.json["status"] != "deploying":
                    return shown.json
                await asyncio.sleep(0.2)

    async def delete(self):
        answer = await self.client.call("DELETE", self.path)
        assert answer.status == 204, answer


async def fetch(url):
    """An application's URL, as a browser resolves it: every name under `localhost` is loopback (RFC 6761)."""
    host = re.match(r"http://([^/:]+)", url)[1]
    async with (
        aiohttp.ClientSession() as http,
        http.get(url.replace(host, "127.0.0.1", 1), headers={"Host": host}) as answer,
    ):
        return answer.status, await answer.text()

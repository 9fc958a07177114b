"""Clients, peers and servers in processes of their own: parameters as JSON in, result as JSON out."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def result_of(module, *, timeout_s=300, **parameters):
    """Run a module of ours to its end; what it printed as JSON."""
    done = subprocess.run(
        _command(module),
        input=json.dumps(parameters),
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
        check=True,
        cwd=_ROOT,
    )
    return json.loads(done.stdout)


@contextlib.contextmanager
def server(module):
    """A module of ours that prints its port and then serves; its Popen and the port."""
    with subprocess.Popen(
        _command(module), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=_ROOT
    ) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _command(module):
    return [sys.executable, "-m", f"benchmarks.{module}"]


def parameters():
    """In such a module: what `result_of` was called with."""
    return json.load(sys.stdin)


def answer(**result):
    json.dump(result, sys.stdout)

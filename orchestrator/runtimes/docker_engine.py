"""docker-py off the event loop: own threads, a bound on every call, connection trouble as `RuntimeUnavailable`."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import docker
import requests.exceptions
import urllib3.exceptions
from docker.errors import APIError, DockerException
from docker.utils import kwargs_from_env

from orchestrator.errors import RuntimeUnavailable

T = TypeVar("T")

_UNREACHABLE: Final = (
    requests.exceptions.RequestException,
    urllib3.exceptions.HTTPError,
    DockerException,
    OSError,
)
_LONGEST_REASON: Final = 300  # characters of an engine's message that go into an error


class Engine:
    """One client for one Docker engine: `DOCKER_HOST` and its like, as for the `docker` command.

    `timeout_s` bounds the wait for a connection and for each piece of an answer. `threads` calls run at a time, the
    others queue: calls that may block for long and calls that must answer soon belong to two engines.
    """

    def __init__(self, *, timeout_s: float, threads: int) -> None:
        self._timeout_s = timeout_s
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="docker")
        self._client: docker.APIClient | None = None
        self._client_lock = threading.Lock()

    async def call(self, function: Callable[[docker.APIClient], T]) -> T:
        """Run `function` with the client in a thread.

        A cancelled caller does not interrupt what the engine was asked to do.

        Raises:
            RuntimeUnavailable: the engine cannot be reached or does not answer in time.
            docker.errors.APIError: the engine answered, with a refusal.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, lambda: function(self._connected()))
        except APIError:
            raise  # it is a RequestException too, but one that the engine sent
        except _UNREACHABLE as error:
            detail = f"The Docker engine cannot be reached: {str(error)[:_LONGEST_REASON]}"
            raise RuntimeUnavailable(detail) from error

    def _connected(self) -> docker.APIClient:
        # Made at the first call and not before: its constructor asks the engine for its version.
        with self._client_lock:
            if self._client is None:
                self._client = docker.APIClient(
                    version="auto",
                    timeout=self._timeout_s,  # type: ignore[arg-type]  # requests takes fractions of a second as well
                    max_pool_size=self._threads,
                    **kwargs_from_env(),
                )
            return self._client

    def close(self) -> None:
        """Release threads and connections. What the engine is doing goes on."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()


def reason_of(error: APIError) -> str:
    """What the engine said, on one line."""
    return " ".join(str(error.explanation or error).split())[:_LONGEST_REASON]

"""Holds a poll for each of many sessions and notes how old each line is once parsed; in a process of its own."""

import asyncio
import json
import re
import time

import uvloop

from benchmarks.processes import answer, parameters

_LINE = re.compile(r"(\d{10}\.\d{6}) ")


class Poller(asyncio.Protocol):
    """One keep-alive connection that polls one session, again and again."""

    def __init__(self, asked, session, delays_ms):
        self._asked, self._session, self._after = asked, session, asked["after"][session]
        self._delays_ms = delays_ms
        self._buffer = bytearray()
        self._transport = None

    def connection_made(self, transport):
        self._transport = transport
        self._poll()

    def _poll(self):
        path = f"/api/v1/code-sessions/{self._session}/output?afterSeq={self._after}&wait=30"
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {self._asked['key']}\r\n\r\n"
        self._transport.write(head.encode())

    def data_received(self, data):
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end])
        size = int(re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)[1])
        if len(self._buffer) < end + 4 + size:
            return
        if b" 200 " not in head[:20]:
            raise RuntimeError(bytes(self._buffer))
        polled = json.loads(self._buffer[end + 4 :])
        now = time.time()
        self._buffer.clear()
        for chunk in polled["chunks"]:
            if chunk["seq"] != self._after + 1:
                raise AssertionError(f"seq {chunk['seq']} after {self._after}")
            self._after = chunk["seq"]
            self._delays_ms += [(now - float(printed)) * 1000 for printed in _LINE.findall(chunk["text"])]
        self._poll()


async def main():
    asked = parameters()
    loop = asyncio.get_running_loop()
    failures = []
    loop.set_exception_handler(lambda _, context: failures.append(str(context.get("exception", context["message"]))))
    delays_ms = []
    transports = [
        (await loop.create_connection(lambda s=session: Poller(asked, s, delays_ms), "127.0.0.1", asked["port"]))[0]
        for session in asked["after"]
    ]
    await asyncio.sleep(asked["warm_up_s"])
    delays_ms.clear()
    await asyncio.sleep(asked["measured_s"])
    measured = list(delays_ms)
    for transport in transports:
        transport.abort()
    if failures:
        raise AssertionError(failures[:3])
    answer(delays_ms=measured, cpu_s=time.process_time())


if __name__ == "__main__":
    uvloop.run(main())

"""Types a command and polls for its output, as the documents tell a client to; in a process of its own."""

import time

from benchmarks.expected import Collected
from benchmarks.http_connection import Connection
from benchmarks.processes import answer, parameters


def main():
    asked = parameters()
    collected = Collected(**asked["expected"])
    path, after = f"code-sessions/{asked['session']}", asked["after"]
    connection = Connection(asked["port"], asked["key"])
    polls, chunks = 0, 0
    began, cpu_before = time.perf_counter(), time.process_time()
    connection.call("POST", f"{path}/input", {"text": asked["command"] + "\n"})
    while not collected.complete:
        polled = connection.call("GET", f"{path}/output?afterSeq={after}&wait=30")
        for chunk in polled["chunks"]:
            if chunk["seq"] != after + 1:
                raise AssertionError(f"seq {chunk['seq']} after {after}")
            after = chunk["seq"]
            collected.add(chunk["text"])
        polls, chunks = polls + 1, chunks + len(polled["chunks"])
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_before
    collected.check()
    answer(took_s=took_s, cpu_s=cpu_s, polls=polls, chunks=chunks)


if __name__ == "__main__":
    main()

"""The simplest reader of a terminal there is: read, throw away, again; in a process of its own."""

import os
import time

import ptyprocess

from benchmarks.processes import answer, parameters


def main():
    asked = parameters()
    size = 0
    began = time.perf_counter()
    process = ptyprocess.PtyProcess.spawn(asked["argv"])
    while size < asked["length"]:
        size += len(os.read(process.fd, 65536))
    took_s = time.perf_counter() - began
    process.close(force=True)
    answer(took_s=took_s)


if __name__ == "__main__":
    main()

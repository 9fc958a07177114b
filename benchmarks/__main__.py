"""Runs benchmarks and prints one table. `script/bench --help` says how."""

import argparse
import os
import signal
import sys
import time
import traceback

from benchmarks import creation, flood, keystrokes, many, memory, results_page
from benchmarks.rows import Row, table

BENCHES = {
    "flood": flood.cat_of_a_large_file,
    "lines": flood.many_short_lines,
    "keys": keystrokes.by_polls,
    "socket-keys": keystrokes.by_socket,
    "many": many.delivery_delay,
    "memory": memory.idle_memory,
    "create": creation.to_the_first_prompt,
}


def main():
    options = _options()
    # So that everything that was made is removed: by default the process would just be gone.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    rows, load_before = [], os.getloadavg()[0]
    for name in options.names or BENCHES:
        began = time.monotonic()
        try:
            rows += BENCHES[name](options)
        except Exception as error:  # noqa: BLE001 - the other benchmarks are run all the same
            traceback.print_exc()
            rows.append(Row(name, failed=True, notes=[f"{name}: {type(error).__name__}: {error}"]))
        print(f"== {name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    text = "\n".join([table(rows), "", *(f"- {note}" for row in rows for note in row.notes)])
    print(text)
    if options.write:
        results_page.write(text, load_before=load_before)
    return any(row.failed for row in rows)


def _options():
    parser = argparse.ArgumentParser(prog="script/bench")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHES)}; all when none is named")
    parser.add_argument("--runs", type=int, default=5, help="of ours and of the peer, in turn (default 5)")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results.md")
    parser.add_argument(
        "--profile", action="store_true", help="of flood, lines and many: also where serve and sidecar spend time"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    if options.write and options.names:
        parser.error("--write keeps a whole table: name no benchmark")
    return options


if __name__ == "__main__":
    sys.exit(main())

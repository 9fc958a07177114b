"""What the proofs share: a control plane that keeps all of a flood, in a place of its own."""

import contextlib

from tests.end_to_end.harness import Serve

KEEP_BYTES = 512 * 1024 * 1024


@contextlib.contextmanager
def keeping_all(folder, **settings):
    """A control plane that trims nothing in these tests, limits no caller, and is gone afterwards."""
    settings = {
        "CODE_SESSIONS_OUTPUT_RETENTION_BYTES": str(KEEP_BYTES),
        "CODE_SESSIONS_RATE_LIMIT_PER_MINUTE": "0",
        **settings,
    }
    serve = Serve(folder / "data", **settings)
    try:
        serve.start()
        yield serve
        serve.stop()
    finally:
        serve.remove_all()

"""A day's work in one session, by input and polling alone."""

from tests.end_to_end.conftest import on_both_runtimes
from tests.end_to_end.harness import fetch

pytestmark = on_both_runtimes("shared_serve")

APP = r"""cat > app.py <<'EOF'
from flask import Flask

app = Flask(__name__)


@app.get("/")
def index():
    return "Hello from Flaks!"
EOF
cat > requirements.txt <<'EOF'
flask
gunicorn
EOF
cat > test_app.py <<'EOF'
from app import app


def test_index():
    assert app.test_client().get("/").text == "Hello from Flask!"
EOF
"""


async def test_a_project_is_written_installed_edited_run_tested_and_deployed(client):
    session = await client.create("hello-flask", "Real work")
    text, status = await session.run("git init -q . && git status --short --branch && pwd")
    assert status == 0
    assert "hello-flask" in text
    await session.send(APP)
    _, status = await session.run(
        "python3 -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt pytest", 180
    )
    assert status == 0

    text, status = await session.run("python -m pytest -q test_app.py 2>&1 | tail -3; (exit ${PIPESTATUS[0]})", 60)
    assert status == 1, "the typo is still there"

    await session.send("vim -u NONE -N app.py\n")
    await session.until(r'"app\.py" \d+L')  # drawn: what is typed earlier than that is vim's to lose
    await session.send(":%s/Flaks/Flask/\n")
    await session.send(":wq\n")
    await session.until(r"written[^$#]*[$#] ")
    text, status = await session.run("python -m pytest -q test_app.py 2>&1 | tail -3; (exit ${PIPESTATUS[0]})", 60)
    assert status == 0
    assert "1 passed" in text

    await session.send("flask --app app run --port 0\n")
    await session.until(r"Running on http")
    await session.send("\x03")
    _, status = await session.run("true")
    assert status == 0

    text, status = await session.run("seq 1 300000", 60)
    numbers = [line for line in text.splitlines() if line.isdigit()]
    assert numbers == [str(number) for number in range(1, 300_001)][-len(numbers) :]
    assert len(numbers) >= 299_999  # the first stands beside an escape sequence
    text, _ = await session.run("printf '│ 😀 ─ é ┘\\n'")
    assert "│ 😀 ─ é ┘\r\n" in text
    assert session.seqs == list(range(1, len(session.seqs) + 1))

    deployment = await session.deploy()
    assert deployment["status"] == "running", deployment
    assert await fetch(deployment["url"]) == (200, "Hello from Flask!")
    await session.delete()
    assert (await session.show())["status"] == "completed"
    assert await fetch(deployment["url"]) == (200, "Hello from Flask!"), "an application outlives its session"


async def test_full_screen_programs_line_editing_and_job_control_work(client):
    session = await client.create("screens")
    await session.run("true")
    await session.send("vim -u NONE -N +'call setline(1, \"drawn by vim\")'\n")
    await session.until(r"\x1b\[\?1049h(?s:.*)drawn by vim")  # on the alternate screen
    await session.send(":q!\n")
    await session.until(r"\x1b\[\?1049l[^$#]*[$#] ")
    await session.send("echo lime-editing" + "\x1b[D" * 9 + "\x7fn" + "\x05\n")
    await session.until("line-editing\r\n")
    await session.send("sleep 500\n")
    await session.until("sleep 500")
    await session.send("\x1a")
    await session.until("Stopped")
    text, _ = await session.run("jobs; kill %1")
    assert "sleep 500" in text
    await session.run("stty -echo")
    await session.send("echo r''eady; cat > typed.txt\n")
    await session.until("ready")
    await session.send("first\nsecond\n")
    await session.send("\x04")
    text, _ = await session.run("cat typed.txt | wc -l; tput cols; tput lines; tput colors")
    assert "2\r\n80\r\n24\r\n256\r\n" in text


async def test_bytes_that_are_no_utf8_are_shown_as_replacement_and_exact_in_base64(client):
    import base64

    session = await client.create("bytes")
    await session.run("stty -echo; PS1=")
    before = session.after
    await session.run(r"printf 'A\xff\xc3\xa9\xe2\x82B'")
    answer = await client.call("GET", f"{session.path}/output?afterSeq={before}")
    assert "A�é�B" in "".join(chunk["text"] for chunk in answer.json["chunks"])
    exact = await client.call("GET", f"{session.path}/output?afterSeq={before}&encoding=base64")
    assert b"A\xff\xc3\xa9\xe2\x82B" in b"".join(base64.b64decode(chunk["data"]) for chunk in exact.json["chunks"])


async def test_the_exit_of_the_shell_is_told_and_a_new_terminal_goes_on(client):
    session = await client.create("exits")
    await session.run("echo before > kept.txt")
    await session.send("exit 3\n")
    shown = await session.until_state("exited")
    assert shown["terminal"]["exitCode"] == 3
    assert shown["status"] == "running"
    refused = await client.call("POST", f"{session.path}/input", {"text": "x"})
    assert (refused.status, refused.json["code"]) == (409, "terminal-exited")
    started = await client.call("POST", f"{session.path}/terminal", {"cols": 100, "rows": 30})
    assert started.status == 201, started
    assert started.json["terminal"] == {"state": "running", "cols": 100, "rows": 30}
    text, _ = await session.run("cat kept.txt; stty size")
    assert "before\r\n30 100\r\n" in text
    again = await client.call("POST", f"{session.path}/terminal")
    assert (again.status, again.json["code"]) == (409, "terminal-running")
    assert session.seqs == list(range(1, len(session.seqs) + 1))
    await session.send("kill -9 $$\n")
    shown = await session.until_state("exited")
    assert shown["terminal"]["signal"] == "SIGKILL"


async def test_the_shell_knows_nothing_of_the_sidecars_secrets(client):
    session = await client.create("secrets")
    await session.run("stty -echo; PS1=; bind 'set enable-bracketed-paste off'")
    text, _ = await session.run("(env; set) | grep -ci 'code_sessions_\\|link_token'")
    assert text.lstrip().startswith("0\r\n")


async def test_output_waits_for_what_comes_and_answers_as_soon_as_it_is_there(client):
    import asyncio
    import time

    session = await client.create("waits")
    await session.run("stty -echo; PS1=; bind 'set enable-bracketed-paste off'")
    await session.run("true")
    began = time.monotonic()
    empty = await client.call("GET", f"{session.path}/output?afterSeq={session.after}&wait=0.5")
    assert 0.4 < time.monotonic() - began < 2
    assert empty.json["chunks"] == []
    assert empty.json["lastSeq"] == session.after
    waiting = asyncio.create_task(client.call("GET", f"{session.path}/output?afterSeq={session.after}&wait=30"))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    await session.send("echo now\n")
    answer = await waiting
    assert time.monotonic() - began < 1
    assert "now" in "".join(chunk["text"] for chunk in answer.json["chunks"])


async def test_a_page_is_bounded_and_says_that_there_is_more(client):
    session = await client.create("pages")
    await session.run("stty -echo; PS1=; bind 'set enable-bracketed-paste off'")
    before = session.after
    await session.run("head -c 3000000 /dev/zero | tr '\\0' x")
    answer = await client.call("GET", f"{session.path}/output?afterSeq={before}")
    size = sum(len(chunk["text"]) for chunk in answer.json["chunks"])
    assert 900_000 < size < 1_200_000
    assert answer.json["hasMore"] is True
    one = await client.call("GET", f"{session.path}/output?afterSeq={before}&limit=1")
    assert [chunk["seq"] for chunk in one.json["chunks"]] == [before + 1]
    assert one.json["lastSeq"] == before + 1
    beyond = await client.call("GET", f"{session.path}/output?afterSeq=999999")
    assert beyond.json["chunks"] == []
    assert beyond.json["lastSeq"] == session.after


async def test_sessions_are_listed_newest_first_in_pages(client):
    sessions = [await client.create(f"listed-{number}") for number in range(5)]
    wanted = [session.id for session in reversed(sessions)]
    seen, cursor = [], ""
    while len(seen) < 5:
        answer = await client.call("GET", f"code-sessions?limit=2&cursor={cursor}")
        seen += [session["id"] for session in answer.json["sessions"]]
        cursor = answer.json["nextCursor"]
    assert seen[:5] == wanted
    for session in sessions:
        await session.delete()
    running = await client.call("GET", "code-sessions?status=running&limit=200")
    assert not {session["id"] for session in running.json["sessions"]} & set(wanted)

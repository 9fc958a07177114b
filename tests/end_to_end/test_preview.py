"""What a deployment would do, asked of a real workspace."""

from tests.end_to_end.conftest import on_both_runtimes


@on_both_runtimes("shared_serve")
async def test_a_preview_tells_what_is_deployed_and_what_is_left_out(client):
    session = await client.create("preview")
    commands = (
        "printf 'from flask import Flask\\napp = Flask(\"x\")\\n' > app.py; echo flask > requirements.txt; "
        "echo KEY=1 > .env; printf 'dist/\\n' > .gitignore; mkdir -p dist node_modules/x; echo x > dist/index.html; "
        "echo y > node_modules/x/y.js"
    )
    _, status = await session.run(commands)
    assert status == 0
    answer = await client.call("GET", f"{session.path}/deploy/preview")
    assert answer.status == 200, answer
    shown = answer.json
    assert (shown["deployable"], shown["kind"], shown["healthPath"]) == (True, "python", "/")
    assert shown["start"].startswith("gunicorn app:app ")
    assert [entry["path"] for entry in shown["files"]] == [".gitignore", "app.py", "requirements.txt"]
    assert (shown["fileCount"], shown["filesOmitted"]) == (3, 0)
    assert shown["totalBytes"] == sum(entry["bytes"] for entry in shown["files"]) > 0
    assert shown["leftOut"] == [
        {"path": ".env", "reason": "secret"},
        {"path": "dist/", "reason": "ignored", "rule": ".gitignore:1: dist/"},
        {"path": "node_modules/", "reason": "dependencies"},
    ]
    assert (shown["leftOutCount"], shown["leftOutReasons"]["secret"]) == (3, 1)
    assert any("dist/" in warning for warning in shown["warnings"])
    _, status = await session.run("rm app.py requirements.txt")
    assert status == 0
    answer = await client.call("GET", f"{session.path}/deploy/preview")
    assert (answer.status, answer.json["deployable"]) == (200, False)
    assert "Nothing says how to run this project" in answer.json["reason"]
    await session.delete()
    answer = await client.call("GET", f"{session.path}/deploy/preview")
    assert (answer.status, answer.json["code"]) == (409, "session-ended")

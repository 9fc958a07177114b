"""A backing-track generator: sessions are created, run once, and give MIDI files."""

import uuid
from datetime import UTC, datetime
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from midi import write_file
from music import GENRES, KEYS, MODES, compose
from pydantic import BaseModel, Field, field_validator

OUTPUT = Path("output")
app = FastAPI(title="Backing tracks")
sessions = {}


class Wishes(BaseModel):
    genre: str = "classic_rock"
    key: str = "C"
    mode: str = "major"
    tempo: int = Field(120, ge=40, le=300)
    sections: int = Field(4, ge=1, le=32)
    with_keys: bool = False

    @field_validator("genre", "key", "mode")
    @classmethod
    def known(cls, value, info):
        choices = {"genre": GENRES, "key": KEYS, "mode": MODES}[info.field_name]
        if value not in choices:
            raise ValueError(f"unknown {info.field_name}; known are {', '.join(choices)}")
        return value


@app.exception_handler(RequestValidationError)
async def bad_request(_: Request, error: RequestValidationError):
    problems = [{"field": ".".join(map(str, item["loc"][1:])), "problem": item["msg"]} for item in error.errors()]
    return JSONResponse({"detail": problems}, 400)


@app.get("/")
def about():
    return {"service": "backing tracks", "genres": list(GENRES), "sessions": len(sessions)}


@app.post("/sessions", status_code=201)
def create(wishes: Wishes):
    session_id = str(uuid.uuid4())
    sessions[session_id] = {"id": session_id, "status": "pending", **wishes.model_dump(), "created_at": now()}
    return {name: sessions[session_id][name] for name in ("id", "status", "created_at")}


@app.post("/sessions/{session_id}/run")
def run(session_id: str):
    session = found(session_id)
    if session["status"] != "pending":
        raise HTTPException(409, "The session has been run already")
    session["status"] = "running"
    parts = compose(*(session[name] for name in ("genre", "key", "mode", "sections", "with_keys")))
    tracks = [(name, channel, program, notes) for name, (channel, program, notes) in parts.items()]
    OUTPUT.mkdir(exist_ok=True)
    for track in tracks:
        write_file(path_of(session_id, track[0]), session["tempo"], [track])
    write_file(path_of(session_id, "full"), session["tempo"], tracks)
    session["tracks"] = [
        {"instrument": name, "channel": channel, "file": str(path_of(session_id, name))} for name, channel, *_ in tracks
    ]
    session["files"] = [*(track["file"] for track in session["tracks"]), str(path_of(session_id, "full"))]
    session |= {"status": "completed", "completed_at": now()}
    return {name: session[name] for name in ("id", "status", "files")}


@app.get("/sessions/{session_id}")
def show(session_id: str):
    return {name: value for name, value in found(session_id).items() if name != "tracks"}


@app.get("/sessions/{session_id}/tracks")
def tracks(session_id: str):
    return found(session_id).get("tracks", [])


@app.get("/sessions/{session_id}/export")
def export(session_id: str):
    if found(session_id)["status"] != "completed":
        raise HTTPException(409, "The session has not been run yet")
    return FileResponse(
        path_of(session_id, "full"), media_type="application/octet-stream", filename="backing-track.mid"
    )


def found(session_id):
    if session_id not in sessions:
        raise HTTPException(404, "There is no such session")
    return sessions[session_id]


def path_of(session_id, part):
    return OUTPUT / f"{session_id[:8]}_{part}.mid"


def now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

"""Counts votes, with nothing but the standard library: POST /votes/<name>, GET / for the tally."""

import argparse
import json
import os
import sqlite3
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DATABASE = "votes.db"


def connect():
    return sqlite3.connect(DATABASE, timeout=10)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/":
            return self.answer(404, {"error": "not found"})
        with connect() as database:
            return self.answer(200, dict(database.execute("SELECT name, count FROM votes ORDER BY name")))

    def do_POST(self):
        _, collection, name = [*self.path.split("/"), "", ""][:3]
        if collection != "votes" or not name.isalnum():
            return self.answer(404, {"error": "not found"})
        with connect() as database:
            database.execute("INSERT INTO votes VALUES (?, 1) ON CONFLICT DO UPDATE SET count = count + 1", [name])
        return self.answer(200, {"counted": name})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    with connect() as database:
        database.execute("CREATE TABLE IF NOT EXISTS votes (name TEXT PRIMARY KEY, count INTEGER NOT NULL)")
    host = os.environ.get("HOST", "127.0.0.1")
    ThreadingHTTPServer((host, parser.parse_args().port), Handler).serve_forever()

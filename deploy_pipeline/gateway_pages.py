"""What the gateway answers itself: static sites, whose folder is never left, and pages that say what is wrong."""

import contextlib
import html
import mimetypes
from pathlib import Path
from urllib.parse import unquote

from aiohttp import web


def serve_static(request: web.Request, root: Path) -> web.StreamResponse:
    if request.method not in {"GET", "HEAD"}:
        response = page(request, 405, "Not allowed", "This is a static site: it can only be read.")
        response.headers["Allow"] = "GET, HEAD"
        return response
    path = unquote(request.raw_path.partition("?")[0])
    found = _inside(root, path)
    if found is not None and found.is_dir():
        if not path.endswith("/"):
            # One slash in front, whatever the path began with: "//host" would lead the visitor elsewhere.
            place = "/" + request.rel_url.raw_path.strip("/") + "/"
            return web.Response(status=308, headers={"Location": place})
        found = _inside(root, path + "index.html")
    if found is not None and found.is_file():
        return web.FileResponse(found, headers={"Cache-Control": "no-cache", **_text_type(found)})
    missing = _inside(root, "404.html")
    if missing is not None and missing.is_file():
        return web.Response(status=404, body=missing.read_bytes(), content_type="text/html", charset="utf-8")
    return page(request, 404, "Not found", "This site has no such page.")


def _text_type(file: Path) -> dict[str, str]:
    """The type of a text with its charset, as Caddy gives it in containers: without one, browsers take a page that does
    not say its own for windows-1252. Other types are FileResponse's to find.
    """
    kind, encoding = mimetypes.guess_type(file.name)
    is_text = kind is not None and encoding is None and (kind.startswith("text/") or kind == "application/javascript")
    return {"Content-Type": f"{kind}; charset=utf-8"} if is_text else {}


def _inside(root: Path, path: str) -> Path | None:
    """The file or folder below `root`; None for dot files, for what is not there, and for what leads out."""
    parts = [part for part in path.split("/") if part]
    if any(part.startswith(".") or "\0" in part for part in parts):
        return None
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a name too long, a loop of links
        real = root.joinpath(*parts).resolve(strict=True)
        inside = real.relative_to(root.resolve())
        if not any(part.startswith(".") for part in inside.parts):
            return real
    return None


def page(request: web.Request, status: int, title: str, text: str) -> web.Response:
    host = html.escape(request.host)
    body = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"><body style="font:1rem/1.5 system-ui;margin:15vh auto;'
        f'max-width:36rem;padding:0 1rem"><h1>{title}</h1><p>{text}</p><p><small>{status} · {host}</small></p>'
    )
    headers = {"Cache-Control": "no-store"}
    if status in {502, 503, 504}:
        headers["Retry-After"] = "2"
    return web.Response(status=status, text=body, content_type="text/html", headers=headers)

"""What a project is and how to run it, from its files alone. Nothing of it is executed here.

The first that fits decides:

1. `deploy.toml` (or `app.json`) may name the `kind`, and for any kind the rest of `ProjectSettings`.
2. `Dockerfile`: built as it is.
3. `Procfile`: its `web:` line.
4. `index.html` in the project's folder, and nothing beside it that declares a server or a build.
5. Python: `requirements.txt` or `pyproject.toml`, or an entry file whose ASGI or WSGI application is found.
6. Node: `package.json` with a `start` script, a `main` file or `server.js`; or a `build` script that makes a site.
7. `index.html` in `public/`, `dist/` or `build/`; else a lone Python or Node entry file.

Two things are decided for what people expect, not by the plain order "static before Python before Node":
an `index.html` beside a Flask or FastAPI application, or beside a `package.json` that can `start` or `build`, belongs
to that application. Serving the folder instead would publish the program's source. And `public/index.html` is a folder
of assets to an Express server, so a server found goes before it. `kind = "static"` in `deploy.toml` overrules both.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from deploy_pipeline.errors import NotDeployable
from deploy_pipeline.project_settings import (
    MANIFEST_BYTES,
    Kind,
    ProjectSettings,
    project_settings,
    read_json,
    read_text,
    read_toml,
)
from deploy_pipeline.python_entry import ENTRY_NAMES, PythonEntry, find_entry

SITE_FOLDERS: Final = ("public", "dist", "build")
_NODE_SITE_FOLDERS: Final = ("dist", "build", "out", "public")  # where Vite, CRA, Next's export and others write
# Everything whose content is looked at here: names, how many folders down, and how much of each.
READ_NAMES: Final = ("deploy.toml", "app.json", "Procfile", "package.json", "pyproject.toml", *ENTRY_NAMES)
READ_DEPTH: Final = 1
READ_BYTES: Final = MANIFEST_BYTES
_SHELL: Final = ("/bin/sh", "-c")


@dataclass(frozen=True, slots=True)
class Plan:
    """How to build and run a project.

    Commands run in the project's folder; `../venv/bin` and `node_modules/.bin` are first on PATH. In `start`, "{host}"
    and "{port}" stand for where to listen; the same is in HOST and PORT.
    """

    kind: Kind
    build: tuple[tuple[str, ...], ...] = ()
    start: tuple[str, ...] = ()  # empty for a static site and for a Dockerfile's own command
    venv: bool = False  # a virtual environment at ../venv comes before the first build step
    roots: tuple[str, ...] = ()  # static: the site's folder, the first of these with an index.html after the build
    health_path: str = "/"
    port: int | None = None  # where it listens in its container; None: at the usual place
    env: dict[str, str] = field(default_factory=dict)

    def start_at(self, host: str, port: int) -> tuple[str, ...]:
        """`start` with the place to listen filled in. The project's own line stays as it is."""
        if self.start[:2] == _SHELL:
            return self.start
        return tuple(part.replace("{host}", host).replace("{port}", str(port)) for part in self.start)


def detect(folder: Path) -> Plan:
    """The plan for the project in `folder`, an unpacked archive.

    Raises:
        NotDeployable: nothing is recognised, or a file that describes the project makes no sense.
    """
    wanted = project_settings(folder)
    if wanted.kind is not None:
        plan = _FINDERS[wanted.kind](folder)
        if plan is None and (wanted.start is None or wanted.kind is Kind.DOCKERFILE):
            raise NotDeployable(f"The project says that its kind is {wanted.kind}, but does not look like it.")
        return _as_wanted(plan or Plan(wanted.kind), wanted)
    plan = _first_fit(folder)
    if wanted.start is not None and (plan is None or plan.kind is Kind.STATIC):
        plan = _dependencies(folder)
    if plan is None:
        raise NotDeployable(_nothing_found(folder))
    return _as_wanted(plan, wanted)


def command_line(step: tuple[str, ...]) -> str:
    """For people: the project's own line as it was written."""
    return step[2] if step[:2] == _SHELL else " ".join(step)


def refusal_by_local_runtime(plan: Plan) -> str:
    """Why the local runtime cannot run it; empty: it can."""
    if plan.kind is Kind.DOCKERFILE:
        return "A Dockerfile project needs the docker runtime: this installation runs applications as plain processes."
    return ""


def site_root(folder: Path, plan: Plan) -> Path:
    """The folder of a static site, once it is built.

    Raises:
        NotDeployable: there is no index.html where it should be.
    """
    for name in plan.roots:
        root = (folder / name).resolve()
        if root.is_relative_to(folder.resolve()) and (root / "index.html").is_file():
            return root
    places = ", ".join(f"{name}/" if name != "." else "the project's folder" for name in plan.roots)
    raise NotDeployable(f"There is no index.html in {places}.{_hint(folder)}")


def _first_fit(folder: Path) -> Plan | None:
    entry = find_entry(folder)
    manifest = _package_json(folder)
    scripts = _scripts(manifest)
    has_server = (entry is not None and entry.object_name != "") or bool({"start", "build"} & set(scripts))
    if plan := _dockerfile(folder) or _procfile(folder):
        return plan
    if (folder / "index.html").is_file() and not has_server:
        return Plan(Kind.STATIC, roots=(".",))
    if _has_python_project(folder) or (entry is not None and entry.object_name):
        return _python(folder) or _node(folder) or _site_below(folder) or _node_file(folder)
    return _node(folder) or _site_below(folder) or _python(folder) or _node_file(folder)


def _dockerfile(folder: Path) -> Plan | None:
    return Plan(Kind.DOCKERFILE) if (folder / "Dockerfile").is_file() else None


def _procfile(folder: Path) -> Plan | None:
    if not (folder / "Procfile").is_file():
        return None
    for line in read_text(folder / "Procfile").splitlines():
        name, _, command = line.partition(":")
        if name.strip() == "web" and command.strip():
            return replace(_dependencies(folder), start=_shell(command.strip()))
    raise NotDeployable('The Procfile has no "web:" line.')


def _dependencies(folder: Path) -> Plan:
    """For a project that says itself how it starts: install what its manifests name, Python's and Node's."""
    steps = (*_pip_install(folder, ()), *_npm_install(folder))
    if "build" in _scripts(_package_json(folder)):
        steps = (*steps, ("npm", "run", "build"))
    return Plan(Kind.PROCFILE, steps, venv=True)


def _static(folder: Path) -> Plan | None:
    return Plan(Kind.STATIC, roots=(".",)) if (folder / "index.html").is_file() else _site_below(folder)


def _site_below(folder: Path) -> Plan | None:
    for name in SITE_FOLDERS:
        if (folder / name / "index.html").is_file():
            return Plan(Kind.STATIC, roots=(name,))
    return None


def _has_python_project(folder: Path) -> bool:
    return (folder / "requirements.txt").is_file() or (folder / "pyproject.toml").is_file()


def _python(folder: Path) -> Plan | None:
    entry = find_entry(folder)
    if entry is None:
        return None
    return Plan(Kind.PYTHON, _pip_install(folder, _packages_of(folder, entry)), _python_start(entry), venv=True)


def _packages_of(folder: Path, entry: PythonEntry) -> tuple[str, ...]:
    """What is needed beside the project's own list: the server, and its framework when there is no list."""
    server = {"asgi": ("uvicorn",), "wsgi": ("gunicorn",)}.get(entry.interface, ())
    if _has_python_project(folder) or not entry.framework:
        return server
    return (entry.framework, *server)


def _python_start(entry: PythonEntry) -> tuple[str, ...]:
    target = f"{entry.module}:{entry.object_name}"
    if entry.interface == "asgi":
        command: tuple[str, ...] = ("uvicorn", target, "--host", "{host}", "--port", "{port}")
        return (*command, "--factory") if entry.is_factory else command
    if entry.interface == "wsgi":
        # One process with threads: an application that keeps something in memory works as it did in the workspace.
        call = "()" if entry.is_factory else ""
        return ("gunicorn", target + call, "--bind", "{host}:{port}", "--workers", "1", "--threads", "8")
    return ("python", entry.file)


def _pip_install(folder: Path, extra: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    install = ("pip", "install", "--no-input", "--progress-bar", "off")
    if (folder / "requirements.txt").is_file():
        return ((*install, "-r", "requirements.txt", *extra),)
    if (folder / "pyproject.toml").is_file():
        project = read_toml(folder / "pyproject.toml")
        if "build-system" in project:
            return ((*install, ".", *extra),)
        # Without a build system the dependencies are wanted, but the folder need not be an installable package.
        listed = project.get("project", {}).get("dependencies", []) if isinstance(project.get("project"), dict) else []
        extra = (*(item for item in listed if isinstance(item, str) and not item.startswith("-")), *extra)
    return ((*install, *extra),) if extra else ()


def _node(folder: Path) -> Plan | None:
    manifest = _package_json(folder)
    if manifest is None:
        return None
    scripts = _scripts(manifest)
    steps = _npm_install(folder)
    if "build" in scripts:
        steps = (*steps, ("npm", "run", "build"))
    if "start" in scripts:
        return Plan(Kind.NODE, steps, ("npm", "start"))
    main = manifest.get("main")
    for name in (main, "server.js", "index.js", "app.js"):
        if isinstance(name, str) and _is_inside(folder, name) and (folder / name).is_file():
            return Plan(Kind.NODE, steps, ("node", f"./{name}"))
    return Plan(Kind.STATIC, steps, roots=_NODE_SITE_FOLDERS) if "build" in scripts else None


def _node_file(folder: Path) -> Plan | None:
    for name in ("server.js", "server.mjs", "index.js", "index.mjs", "app.js", "main.js"):
        if (folder / name).is_file():
            return Plan(Kind.NODE, start=("node", name))
    return None


def _npm_install(folder: Path) -> tuple[tuple[str, ...], ...]:
    if not (folder / "package.json").is_file():
        return ()
    locked = any((folder / name).is_file() for name in ("package-lock.json", "npm-shrinkwrap.json"))
    return (("npm", "ci" if locked else "install"),)


def _node_project(folder: Path) -> Plan | None:
    return _node(folder) or _node_file(folder)


_FINDERS: Final[dict[Kind, Callable[[Path], Plan | None]]] = {
    Kind.DOCKERFILE: _dockerfile,
    Kind.PROCFILE: _procfile,
    Kind.STATIC: _static,
    Kind.PYTHON: _python,
    Kind.NODE: _node_project,
}


def _as_wanted(plan: Plan, wanted: ProjectSettings) -> Plan:
    if wanted.build is not None:
        if plan.kind is Kind.DOCKERFILE:
            raise NotDeployable("build: a Dockerfile has the build's steps itself.")
        plan = replace(plan, build=(*plan.build, _shell(wanted.build)))
    if wanted.start is not None:
        plan = replace(plan, start=_shell(wanted.start))
    if wanted.root is not None:
        if plan.kind is not Kind.STATIC:
            raise NotDeployable(f'root: only a static site has one, and this is detected as {plan.kind}; see "kind".')
        plan = replace(plan, roots=(wanted.root,))
    return replace(plan, health_path=wanted.health_path or plan.health_path, port=wanted.port, env=wanted.env)


def _shell(line: str) -> tuple[str, ...]:
    """The owner's own command line; nothing of ours is ever put into it."""
    return (*_SHELL, line)


def _package_json(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / "package.json") if (folder / "package.json").is_file() else None


def _scripts(manifest: dict[str, Any] | None) -> dict[str, Any]:
    scripts = (manifest or {}).get("scripts")
    return scripts if isinstance(scripts, dict) else {}


def _is_inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())


def _nothing_found(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "The workspace is empty: there is nothing to deploy."
    hint = _hint(folder)
    some = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")  # noqa: PLR2004 - enough to recognise it
    return (
        "Nothing says how to run this project. Expected one of: Dockerfile, Procfile, index.html, a Python entry "
        "(main.py, app.py or server.py), package.json with a start script, or a deploy.toml with a start line. "
        f"Found: {some}.{hint}"
    )


def _hint(folder: Path) -> str:
    """A folder that was built may be missing because an ignore file names it, as .gitignore usually does."""
    for name in (".deployignore", ".dockerignore", ".gitignore"):
        if (folder / name).is_file():
            return f" What {name} names was not deployed; the deploy preview lists it."
    return ""

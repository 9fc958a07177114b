"""Finds the web application object in a Python project by reading its syntax trees; nothing is imported or run."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SOURCE_BYTES: Final = 512 * 1024  # an entry file is small; a parser fed with more only costs memory
ENTRY_NAMES: Final = ("main.py", "app.py", "server.py", "wsgi.py", "asgi.py")
_PLAIN_NAMES: Final = ("main.py", "app.py", "server.py")
_FACTORIES: Final = ("create_app", "make_app")
# What is called to make an application: (interface, package on the index)
_MAKERS: Final = {
    "FastAPI": ("asgi", "fastapi"),
    "Starlette": ("asgi", "starlette"),
    "Quart": ("asgi", "quart"),
    "Litestar": ("asgi", "litestar"),
    "get_asgi_application": ("asgi", "django"),
    "Flask": ("wsgi", "flask"),
    "Bottle": ("wsgi", "bottle"),
    "get_wsgi_application": ("wsgi", "django"),
}
_PACKAGES: Final = {package: (interface, package) for interface, package in _MAKERS.values() if package != "django"}


@dataclass(frozen=True, slots=True)
class PythonEntry:
    """Where a project starts. `object_name` is empty for a plain script, and `interface` then too."""

    file: str  # relative to the project's folder
    module: str = ""
    object_name: str = ""
    interface: str = ""  # "asgi" or "wsgi"
    framework: str = ""  # its package on the index
    is_factory: bool = False


def find_entry(folder: Path) -> PythonEntry | None:
    """The application object of the first entry file that has one; else the first entry file, to be run as a script."""
    for path in _candidates(folder):
        tree = _parse(path)
        found = _application(tree) if tree is not None else None
        if found is None:
            continue
        relative = path.relative_to(folder)
        module = ".".join(relative.with_suffix("").parts)
        if all(part.isidentifier() for part in module.split(".")):
            name, (interface, framework), is_factory = found
            return PythonEntry(relative.as_posix(), module, name, interface, framework, is_factory)
    for name in _PLAIN_NAMES:
        if (folder / name).is_file():
            return PythonEntry(name)
    return None


def _candidates(folder: Path) -> Iterator[Path]:
    """The project's folder first; then packages in it: app/main.py, and Django's <project>/wsgi.py."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    for parent in (folder, *below):
        for name in ENTRY_NAMES:
            path = parent / name
            if path.is_file() and not path.is_symlink():
                yield path


def _parse(path: Path) -> ast.Module | None:
    """None for what is no Python, and for nesting that is made to exhaust the parser."""
    try:
        with path.open("rb") as file:
            return ast.parse(file.read(_SOURCE_BYTES))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _application(tree: ast.Module) -> tuple[str, tuple[str, str], bool] | None:
    """(name, (interface, package), is a factory) of the application made at the top level."""
    for statement in _top_level(tree.body):
        name, value = _assignment(statement)
        maker = _called(value)
        if name and maker in _MAKERS:
            return name, _MAKERS[maker], False
        if name and maker in _FACTORIES and (known := _imported_framework(tree)):
            return name, known, False
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name in _FACTORIES:
            known = _imported_framework(tree)
            return (statement.name, known, True) if known else None
    return None


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those in `try` and `with` included, `if __name__ == ...` not."""
    for statement in body:
        if isinstance(statement, (ast.Try, ast.With)):
            yield from _top_level(statement.body)
        else:
            yield statement


def _assignment(statement: ast.stmt) -> tuple[str, ast.expr | None]:
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id, statement.value
    return "", None


def _called(value: ast.expr | None) -> str:
    """`Flask(__name__)` and `flask.Flask(__name__)` both give "Flask"."""
    if not isinstance(value, ast.Call):
        return ""
    function = value.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _imported_framework(tree: ast.Module) -> tuple[str, str] | None:
    for statement in tree.body:
        names: list[str] = []
        if isinstance(statement, ast.ImportFrom):
            names = [statement.module or ""]
        elif isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        for name in names:
            if known := _PACKAGES.get(name.split(".")[0]):
                return known
    return None

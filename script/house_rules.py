"""Modules of at most 400 lines, functions of at most 50 unless `# long: <why>` stands on the def line."""  # noqa: INP001

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

LONGEST_MODULE_LINES = 400
LONGEST_FUNCTION_LINES = 50
FOLDERS = ("orchestrator", "sidecar", "deploy_pipeline", "script")


def breaches(path: Path) -> Iterator[str]:
    """One line for each thing in this module that is too long."""
    source = path.read_text()
    lines = source.splitlines()
    if len(lines) > LONGEST_MODULE_LINES:
        yield f"{path}: {len(lines)} lines, {LONGEST_MODULE_LINES} at most"
    for node in ast.walk(ast.parse(source, str(path))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > LONGEST_FUNCTION_LINES and "# long: " not in lines[node.lineno - 1]:
            yield f"{path}:{node.lineno}: {node.name} has {length} lines, {LONGEST_FUNCTION_LINES} at most"


def main() -> int:
    found = [text for folder in FOLDERS for path in sorted(Path(folder).rglob("*.py")) for text in breaches(path)]
    sys.stdout.writelines(f"{text}\n" for text in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

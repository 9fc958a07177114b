"""The Dockerfile of a project that has none of its own. Pure: a plan and the project's files in, text out."""

import json
import re
from pathlib import Path
from typing import Final

from deploy_pipeline.detect import Plan
from deploy_pipeline.project_settings import Kind

PORT: Final = 8080
HOST: Final = "0.0.0.0"  # noqa: S104 - inside a container, on a network of its own
# The first of the folders given that holds a page is the site; which one that is shows only after the build.
_SERVE_SITE: Final = (
    'for root in "$@"; do if [ -f "$root/index.html" ]; then '
    'SITE_ROOT="$PWD/$root" exec caddy run --config /etc/code-sessions/Caddyfile --adapter caddyfile; fi; done; '
    'echo "There is no index.html in $*." >&2; exit 1'
)
_INSTALL_HOOKS: Final = frozenset({"preinstall", "install", "postinstall", "prepare"})


def dockerfile_for(plan: Plan, src: Path, base_image: str) -> str:
    """Commands stand in JSON form: nothing that a project says is ever read as a line of the Dockerfile.

    What only installs dependencies from a list comes before the other files, so that its layer is used again.
    """
    lines = [
        f"FROM {base_image}",
        f"ENV HOME=/app HOST={HOST} PORT={plan.port or PORT} PATH=/app/venv/bin:/app/src/node_modules/.bin:$PATH",
        # The folder itself has to be the user's: WORKDIR makes it root's.
        'RUN ["mkdir", "-p", "/app/src"]',
        "WORKDIR /app/src",
    ]
    if plan.venv:
        pip = () if any(step[0] == "pip" for step in plan.build) else ("--without-pip",)
        lines.append(_run(("python3", "-m", "venv", *pip, "/app/venv")))
    early = early_steps(plan, src)
    for step, names in early:
        lines += [f"COPY --chown=app:app {json.dumps([*names, './'])}", _run(step)]
    lines.append('COPY --chown=app:app [".", "./"]')
    lines += [f"ENV {name}={_quoted(value)}" for name, value in plan.env.items()]
    done = {step for step, _ in early}
    lines += [_run(step) for step in plan.build if step not in done]
    lines += ["ENV NODE_ENV=production", f"CMD {json.dumps(_command(plan))}"]
    return "\n".join(lines) + "\n"


def _command(plan: Plan) -> tuple[str, ...]:
    if plan.kind is Kind.STATIC:
        return ("/bin/sh", "-c", _SERVE_SITE, "site", *plan.roots)
    return plan.start_at(HOST, plan.port or PORT)


def _quoted(value: str) -> str:
    """As a value that the Dockerfile's parser reads back as it is: neither expanded nor ended early."""
    return '"' + re.sub(r'(["\\$])', r"\\\1", value) + '"'


def _run(step: tuple[str, ...]) -> str:
    return f"RUN {json.dumps(step)}"


def early_steps(plan: Plan, src: Path) -> list[tuple[tuple[str, ...], list[str]]]:
    """Steps that need no other files than the ones named: (step, files)."""
    early = []
    for step in plan.build:
        if step[0] == "pip" and "requirements.txt" in step and _names_only_packages(src / "requirements.txt"):
            early.append((step, ["requirements.txt"]))
        elif step in {("npm", "ci"), ("npm", "install")} and _is_plain_package(src / "package.json"):
            locks = [name for name in ("package-lock.json", "npm-shrinkwrap.json") if (src / name).is_file()]
            early.append((step, ["package.json", *locks]))
    return early


def _names_only_packages(requirements: Path) -> bool:
    """No options, paths or URLs, which may lead to other files of the project."""
    lines = requirements.read_text("utf-8", "replace").splitlines()
    return all(re.match(r"\s*($|#|[A-Za-z0-9][^/\\]*$)", line) for line in lines)


def _is_plain_package(manifest: Path) -> bool:
    text = manifest.read_text("utf-8", "replace")
    scripts = json.loads(text).get("scripts", {})  # detect() read it before: it is an object
    hooked = isinstance(scripts, dict) and _INSTALL_HOOKS & scripts.keys()
    return not hooked and not any(word in text for word in ('"file:', '"link:', '"workspaces"'))

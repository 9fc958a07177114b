"""`python -m sidecar`: what runs in every workspace. Its settings come from the runtime that starts it.

CODE_SESSIONS_LINK_URL, _SESSION_ID, _WORKSPACE_ID, _LINK_TOKEN: where to dial, and as whom
CODE_SESSIONS_HOME, _PROJECT_DIR: absolute paths; both are made when missing
CODE_SESSIONS_USER: whom the shell runs as; empty: whoever runs the sidecar
"""

import asyncio
import os
import secrets
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.link import Link, LinkConfig
from sidecar.output_log import OutputLog
from sidecar.processes import Reaper, User, adopt_orphans, become, kill_descendants
from sidecar.terminal import Terminal
from sidecar.workspace import ArchiveStream

HANG_UP_S: Final = 1.0  # what programs get after SIGHUP before SIGKILL
LAST_DRAIN_S: Final = 3.0  # for the last output to be acknowledged
_PREFIX: Final = "CODE_SESSIONS_"
_SHELLS: Final = ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh")


@dataclass(frozen=True, slots=True)
class Config:
    link: LinkConfig
    home: Path
    project_dir: Path
    user: User


def take_config() -> Config:
    """Read the environment and take our variables, the token above all, out of it."""
    ours = {name.removeprefix(_PREFIX): os.environ.pop(name) for name in list(os.environ) if name.startswith(_PREFIX)}
    return Config(
        LinkConfig(
            url=ours["LINK_URL"],
            session_id=ours["SESSION_ID"],
            workspace_id=ours["WORKSPACE_ID"],
            token=ours["LINK_TOKEN"],
            boot=secrets.token_hex(8),
        ),
        home=Path(ours["HOME"]),
        project_dir=Path(ours["PROJECT_DIR"]),
        user=User.named(ours["USER"]) if ours.get("USER") else User.current(),
    )


def shell_environment(config: Config) -> dict[str, str]:
    """What the shell starts with: the machine's own environment, a terminal's variables, and nothing of ours."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PWD", "OLDPWD", "SHLVL", "_"}}
    shell = next((path for path in _SHELLS if os.access(path, os.X_OK)), config.user.shell)
    utf8 = "en_US.UTF-8" if sys.platform == "darwin" else "C.UTF-8"
    environment.update(
        HOME=str(config.home),
        USER=config.user.name,
        LOGNAME=config.user.name,
        SHELL=shell,
        TERM="xterm-256color",
        COLORTERM="truecolor",
        LANG=utf8,
        # Which workspace a process belongs to: the local runtime finds by it what escaped from its sidecar.
        CODE_SESSION_WORKSPACE=config.link.workspace_id,
    )
    environment.pop("LC_ALL", None)
    return environment


def make_folders(config: Config) -> None:
    """Home and project folder, made as the workspace's user, who owns them; dot files from /etc/skel in a new home."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if status:
            raise OSError(f"cannot make {config.project_dir}")
        return
    try:  # in the child
        become(config.user)
        new = not config.home.exists() or not any(config.home.iterdir())
        config.home.mkdir(parents=True, exist_ok=True)
        skeleton = Path("/etc/skel")
        if new and skeleton.is_dir():
            shutil.copytree(skeleton, config.home, dirs_exist_ok=True, symlinks=True)
        config.project_dir.mkdir(parents=True, exist_ok=True)
    except BaseException as error:  # noqa: BLE001 - a forked child must never return
        print(f"sidecar: {error}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)
    os._exit(0)


async def run(config: Config) -> None:
    adopt_orphans()
    reaper = Reaper()
    log = OutputLog()
    terminal = Terminal(
        log, reaper, config.user, home=config.home, project_dir=config.project_dir, env=shell_environment(config)
    )
    link = Link(
        config.link, log, terminal, lambda preview: ArchiveStream(config.project_dir, config.user, reaper, preview)
    )
    terminal.on_output = link.pump
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, link.shutdown_requested.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    terminal.start()
    dialling = loop.create_task(link.run())
    await link.shutdown_requested.wait()
    await terminal.hang_up(patience_s=HANG_UP_S)
    await kill_descendants(whole_pid_namespace=config.user.differs)
    await terminal.wait_ended(2.0)
    link.pump()
    with suppress(TimeoutError):
        async with asyncio.timeout(LAST_DRAIN_S):
            await link.drained.wait()
    await link.close()
    dialling.cancel()


def main() -> None:
    config = take_config()
    make_folders(config)
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        asyncio.run(run(config))
    else:
        uvloop.run(run(config))


if __name__ == "__main__":
    main()

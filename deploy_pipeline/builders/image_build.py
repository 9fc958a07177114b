"""`python -m deploy_pipeline.builders.image_build`: one image build, as a process of its own.

docker-py cannot be interrupted in the middle of an answer. A process can: killing it closes the connection, and the
engine then stops the build. The order comes as JSON on the command line, the output goes to standard output.
"""

import io
import json
import re
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import docker
from docker.errors import APIError, DockerException
from docker.utils.build import exclude_paths

_GENERATED = ".code-sessions.Dockerfile"
_IGNORE = ".dockerignore"
_RED = re.compile("\x1b\\[(?:91|0)m")  # the engine paints each piece of standard error


def build(order: dict[str, Any]) -> int:
    """`order`: path, dockerfile, tag, labels, memory_bytes, network, proxy, apply_dockerignore. 0 when it was made."""
    limits: Any = {"memory": order["memory_bytes"], "memswap": order["memory_bytes"]}
    endless: Any = None  # the caller ends this process when it takes too long
    client = docker.APIClient(version="auto", timeout=endless)
    proxy = order["proxy"]
    # The engine takes these for the steps' environment without an ARG, keeps them out of the image and its history, and
    # does not look at them when it compares a step with its cache.
    variables = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
    variables |= dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1,::1")
    with tempfile.TemporaryFile() as context:
        dockerfile = _write_context(context, Path(order["path"]), order["dockerfile"], order["apply_dockerignore"])
        context.seek(0)
        lines = client.build(
            fileobj=context,
            custom_context=True,
            dockerfile=dockerfile,
            tag=order["tag"],
            labels=order["labels"],
            container_limits=limits,
            network_mode=order["network"],
            buildargs=variables,
            rm=True,
            forcerm=True,
            decode=True,
        )
        for line in lines:
            if "error" in line:
                sys.stdout.write(line["error"].rstrip() + "\n")
                return 1
            sys.stdout.write(_RED.sub("", line.get("stream", "")))
            sys.stdout.flush()
    return 0


def _write_context(sink: BinaryIO, path: Path, dockerfile: str, apply_dockerignore: bool) -> str:
    """The files as the engine wants them; the name of the Dockerfile in there.

    Owners and times are always the same: the engine compares files with its cache by their owner and mode, too. What is
    in the project's .dockerignore counts only for the project's own Dockerfile.
    """
    patterns: list[str] = []
    if apply_dockerignore and (path / _IGNORE).is_file():
        lines = (path / _IGNORE).read_text("utf-8", "replace").splitlines()
        patterns = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    generated = Path(dockerfile).is_absolute()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name in sorted(exclude_paths(str(path), patterns, dockerfile=None if generated else dockerfile)):
            if not (generated and name == _IGNORE):
                archive.add(path / name, arcname=name, recursive=False, filter=_plain)
        if generated:
            archive.add(dockerfile, arcname=_GENERATED, filter=_plain)
            # The engine takes these two out of the context when a .dockerignore names them.
            content = f"{_GENERATED}\n{_IGNORE}\n".encode()
            ours = tarfile.TarInfo(_IGNORE)
            ours.size = len(content)
            archive.addfile(ours, io.BytesIO(content))
    return _GENERATED if generated else dockerfile


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> int:
    try:
        return build(json.loads(sys.argv[1]))
    except APIError as error:
        sys.stdout.write(f"{error.explanation or error}\n")
    except DockerException as error:
        sys.stdout.write(f"The container engine cannot be reached: {error}\n")
    except (OSError, TypeError, ValueError) as error:  # an unreadable Dockerfile or .dockerignore
        sys.stdout.write(f"The build could not be started: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""`python -m deploy_pipeline.builders.image_build`: one image build, as a process of its own.

docker-py cannot be interrupted in the middle of an answer. A process can: killing it closes the connection, and the
engine then stops the build. The order comes as JSON on the command line, the output goes to standard output.
"""

import json
import sys
from typing import Any

import docker
from docker.errors import APIError, DockerException


def build(order: dict[str, Any]) -> int:
    """`order`: path, dockerfile, tag, labels, memory_bytes. 0 when the image was made."""
    limits: Any = {"memory": order["memory_bytes"], "memswap": order["memory_bytes"]}
    endless: Any = None  # the caller ends this process when it takes too long
    client = docker.APIClient(version="auto", timeout=endless)
    lines = client.build(
        path=order["path"],
        dockerfile=order["dockerfile"],
        tag=order["tag"],
        labels=order["labels"],
        container_limits=limits,
        rm=True,
        forcerm=True,
        decode=True,
    )
    for line in lines:
        if "error" in line:
            sys.stdout.write(line["error"].rstrip() + "\n")
            return 1
        sys.stdout.write(line.get("stream", ""))
        sys.stdout.flush()
    return 0


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

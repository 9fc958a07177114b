"""README's tour as it is written there, pasted into a shell."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TOUR_S = 120


def section(title):
    return re.search(rf"^#+ {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def readme_tour(api, key):
    """The tour's blocks as they are written, with the two values that a reader sets."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", section("The tour"), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    values = {"API": api, "KEY": key}
    settings, count = re.subn(
        r"(?m)^export (API|KEY)=.*$", lambda line: f"export {line[1]}={values[line[1]]}", blocks[0]
    )
    assert count == 2
    return "".join([settings, *blocks[1:]])


def paste(commands, cwd, **environment):
    """What bash prints for commands that arrive on its standard input."""
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(cwd), "LANG": "C.UTF-8", **environment}
    shell = subprocess.run(
        ["bash"], input=commands, text=True, capture_output=True, cwd=cwd, env=environment, timeout=TOUR_S, check=False
    )
    assert shell.stderr == "", shell
    assert shell.returncode == 0, shell
    return shell.stdout


def assert_the_tour_went_through(printed):
    assert re.search(r"^cs_\w+$", printed, re.MULTILINE), printed
    assert '{"sent":true,"bytes":' in printed, printed
    assert "six times seven is 42" in printed, printed
    assert "\nrunning\n" in printed, printed
    assert printed.endswith("<title>Tour</title>\n<h1>Typed through a terminal</h1>\n204\n"), printed

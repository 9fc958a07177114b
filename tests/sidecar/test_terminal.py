"""A real shell on a real PTY, with the log as its only witness."""

import asyncio
import signal
import sys

import pytest

from sidecar.output_log import OutputLog
from sidecar.processes import Reaper, User
from sidecar.protocol import ONCE, RecordKind
from sidecar.terminal import REMEMBERED_INPUTS, Refused, Terminal


class Watched:
    """A terminal whose log is read as the control plane would: everything is acknowledged at once, unless `away`."""

    def __init__(self, tmp_path, log=None):
        self.log = log or OutputLog()
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        env = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "SHELL": "/bin/bash",
            "TERM": "xterm-256color",
        }
        env |= {"PS1": "$ ", "LANG": "C.UTF-8"}
        (home / ".bash_profile").write_text("PS1='$ '\nbind 'set enable-bracketed-paste off' 2>/dev/null\n")
        self.reaper = Reaper()
        self.terminal = Terminal(self.log, self.reaper, User.current(), home=home, project_dir=home, env=env)
        self.terminal.on_output = self.take
        self.records = []
        self.away = False
        self.changed = asyncio.Event()

    def take(self):
        if self.away:
            return
        while batch := self.log.take_batch():
            self.records += batch
            self.log.acknowledge(batch[-1].seq)
        self.terminal.room()
        self.changed.set()

    def back(self):
        self.away = False
        self.take()

    @property
    def output(self):
        return b"".join(record.data for record in self.records if record.kind is RecordKind.OUTPUT)

    @property
    def kinds(self):
        return [record.kind for record in self.records if record.kind is not RecordKind.OUTPUT]

    async def end(self):
        await self.terminal.hang_up(patience_s=3)
        self.reaper.close()

    async def until(self, condition, timeout_s=15):
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def run(self, line):
        marker = b"<%d>" % len(self.records)
        await self.terminal.write("", line.encode() + b"; echo '" + marker[:1] + b"''" + marker[1:] + b"'\n")
        await self.until(lambda: marker + b"\r\n" in self.output)


@pytest.fixture
async def watched(tmp_path):
    watched = Watched(tmp_path)
    watched.terminal.start()
    await watched.until(lambda: b"$ " in watched.output)
    yield watched
    watched.back()
    await watched.end()


async def test_the_shell_is_a_login_shell_on_a_terminal_of_80_by_24(watched):
    await watched.run("shopt -q login_shell && echo is-login; tty; stty size")
    assert b"is-login" in watched.output
    assert b"/dev/pts/" in watched.output or sys.platform != "linux"
    assert b"24 80" in watched.output


async def test_a_megabyte_of_input_arrives_completely_though_the_terminal_takes_it_in_pieces(watched):
    data = bytes(range(32, 127)) * 11_000
    await watched.terminal.write("", b"stty raw -echo; head -c %d | sha256sum; stty sane; echo o''ver\n" % len(data))
    await asyncio.sleep(0.3)
    assert await watched.terminal.write("", data) == len(data)
    await watched.until(lambda: b"over" in watched.output)
    import hashlib

    assert hashlib.sha256(data).hexdigest().encode() in watched.output


async def test_the_same_key_writes_once_however_often_it_is_sent(watched):
    for _ in range(5):
        assert await watched.terminal.write("key-1", b"echo once-$((40+2))\n") == 20
    await watched.run("true")
    assert watched.output.count(b"once-42") == 1


async def test_a_key_is_remembered_however_much_is_typed_without_one(watched):
    await watched.run("stty -echo")
    await watched.terminal.write("key-1", b"echo once-$((40+2))\n")
    await watched.until(lambda: b"once-42" in watched.output)
    for number in range(REMEMBERED_INPUTS + 1):
        await watched.terminal.write(f"{ONCE}{number}", b"\n")
    assert await watched.terminal.write("key-1", b"echo once-$((40+2))\n") == 20
    await watched.run("true")
    assert watched.output.count(b"once-42") == 1


async def test_the_same_key_with_other_input_is_refused(watched):
    await watched.terminal.write("key-2", b"true\n")
    with pytest.raises(Refused) as refused:
        await watched.terminal.write("key-2", b"false\n")
    assert refused.value.code == "idempotency-key-reused"


async def test_inputs_that_are_sent_together_are_written_one_after_the_other(watched):
    await watched.run("stty -echo")
    await watched.terminal.write("", b"cat > all.txt\n")
    lines = [b"%04d " % number * 200 + b"\n" for number in range(100)]
    await asyncio.gather(*(watched.terminal.write("", line) for line in lines))
    await watched.terminal.write("", b"\x04")
    await watched.run("sha256sum all.txt")
    import hashlib

    assert hashlib.sha256(b"".join(lines)).hexdigest().encode() in watched.output


async def test_ctrl_c_interrupts_what_runs(watched):
    await watched.terminal.write("", b"sleep 1000\n")
    await asyncio.sleep(0.3)
    await watched.terminal.write("", b"\x03")
    await watched.run("echo status-$?")
    assert b"status-130" in watched.output


async def test_programs_see_default_signals_whatever_their_ancestors_ignored(tmp_path):
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # as a script does to what it starts in the background
    watched = Watched(tmp_path)
    watched.terminal.start()
    signal.signal(signal.SIGQUIT, before)
    await watched.run("trap; yes | head -1; echo ${PIPESTATUS[0]}")
    assert b"141" in watched.output  # 128 + SIGPIPE: not ignored
    assert b"trap --" not in watched.output
    await watched.end()


async def test_a_resize_reaches_the_program_and_stands_in_the_log(watched):
    watched.terminal.resize(132, 50)
    await watched.run("stty size")
    assert b"50 132" in watched.output
    assert RecordKind.RESIZE in watched.kinds


async def test_a_signal_reaches_the_foreground_job(watched):
    await watched.terminal.write("", b"sleep 1000\n")
    await asyncio.sleep(0.3)
    watched.terminal.signal("SIGTERM")
    await watched.run("echo status-$?")
    assert b"status-143" in watched.output


async def test_the_exit_stands_in_the_log_after_all_output(watched):
    await watched.terminal.write("", b"seq 1 20000; exit 7\n")
    await watched.until(lambda: RecordKind.EXIT in watched.kinds)
    assert watched.records[-1].data == b'{"exitCode":7}'
    assert b"\r\n20000\r\n" in watched.output


async def test_a_shell_that_is_killed_says_by_which_signal(watched):
    await watched.terminal.write("", b"kill -9 $$\n")
    await watched.until(lambda: RecordKind.EXIT in watched.kinds)
    assert watched.records[-1].data == b'{"signal":"SIGKILL"}'


async def test_a_descendant_that_holds_the_terminal_delays_its_end_by_a_moment_only(watched):
    await watched.terminal.write("", b"(trap '' HUP; sleep 30) & disown; exit 0\n")
    await watched.until(lambda: RecordKind.EXIT in watched.kinds, timeout_s=5)
    assert watched.records[-1].data == b'{"exitCode":0,"ptyHeldOpen":true}'


async def test_input_after_the_exit_is_refused_and_a_new_shell_goes_on_with_the_numbers(watched):
    await watched.terminal.write("", b"exit\n")
    await watched.until(lambda: RecordKind.EXIT in watched.kinds)
    with pytest.raises(Refused) as refused:
        await watched.terminal.write("", b"echo\n")
    assert refused.value.code == "terminal-exited"
    watched.terminal.start()
    await watched.run("echo again")
    assert watched.kinds == [RecordKind.START, RecordKind.EXIT, RecordKind.START]
    assert [record.seq for record in watched.records] == list(range(1, len(watched.records) + 1))


async def test_a_second_shell_at_once_is_refused(watched):
    with pytest.raises(Refused) as refused:
        watched.terminal.start()
    assert refused.value.code == "terminal-running"


async def test_while_nobody_takes_the_output_the_program_waits_and_nothing_is_lost(tmp_path):
    watched = Watched(tmp_path, OutputLog(window_bytes=100_000))
    watched.terminal.start()
    await watched.until(lambda: b"$ " in watched.output)
    watched.away = True
    await watched.terminal.write("", b"seq 1 100000; exit\n")
    await asyncio.sleep(2)
    assert watched.log.full
    assert watched.log.waiting_bytes < 400_000
    watched.back()
    await watched.until(lambda: RecordKind.EXIT in watched.kinds)
    numbers = [line for line in watched.output.decode().split("\r\n") if line.isdigit()]
    assert numbers == [str(number) for number in range(1, 100_001)]
    await watched.end()


async def test_a_program_that_never_reads_is_told_with_how_much_was_written(watched, monkeypatch):
    monkeypatch.setattr("sidecar.terminal.INPUT_PATIENCE_S", 1.0)
    await watched.terminal.write("", b"stty raw -echo; sleep 20\n")
    await asyncio.sleep(0.3)
    with pytest.raises(Refused) as refused:
        await watched.terminal.write("stuck", b"x" * 500_000)
    assert refused.value.code == "terminal-not-reading"
    assert 0 < refused.value.facts["writtenBytes"] < 500_000


async def test_hanging_up_ends_the_shell_and_its_foreground_job(watched):
    await watched.terminal.write("", b"sleep 1000\n")
    await asyncio.sleep(0.2)
    assert await watched.terminal.hang_up(patience_s=3)
    assert RecordKind.EXIT in watched.kinds
    assert signal.SIGHUP.name.encode() in watched.records[-1].data or b"exitCode" in watched.records[-1].data


async def test_a_project_folder_that_is_gone_does_not_keep_a_new_shell_from_starting(tmp_path):
    watched = Watched(tmp_path)
    watched.terminal._project_dir = tmp_path / "no-such-folder"
    watched.terminal.start()
    await watched.run("pwd")
    assert str(tmp_path / "home").encode() in watched.output
    await watched.end()

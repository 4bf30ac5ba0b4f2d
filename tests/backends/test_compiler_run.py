"""Running compilers: their words, their time, and their children."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from genft_kernels.backends.compiled.run import BuildError, run


def sh(script, limit=60, folder=None):
    return run("the shell", ["sh", "-c", script], limit, folder)


def test_the_output_has_both_streams_and_any_bytes():
    assert sh(r"echo one; echo two >&2; printf '\377\n'") == "one\ntwo\n\ufffd\n"


def test_a_failure_tells_the_last_lines():
    with pytest.raises(BuildError, match="^the shell failed with exit status 3: line 16\n(.*\n)*line 40$"):
        sh("for i in $(seq 40); do echo line $i; done; exit 3")
    with pytest.raises(BuildError, match=r"failed with exit status -9: \(no output\)"):
        sh("kill -9 $$")


def test_what_is_no_program_cannot_be_run(tmp_path):
    with pytest.raises(BuildError, match="^it cannot be run: .*No such file"):
        run("it", [tmp_path / "none"], 1)


def ends(pid):
    """Whether a process is gone, or waits only for somebody to ask how it ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("script", ["sleep 300 & echo $! > pid; wait", "sleep 300 & echo $! > pid"])
def test_who_hangs_is_killed_with_its_children(script, tmp_path):
    start = time.monotonic()
    with pytest.raises(BuildError, match=r"the shell was not done after 0\.5 s"):
        sh(script, 0.5, tmp_path)
    assert time.monotonic() - start < 10 and ends((tmp_path / "pid").read_text().strip())


def test_an_interrupt_leaves_no_compiler_behind(tmp_path, monkeypatch):
    def interrupt(process, **options):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sh("sleep 300 & echo $! > pid; wait", 60, tmp_path)
    assert ends((tmp_path / "pid").read_text().strip())


def test_temporary_files_stay_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    assert sh('cd "$TMPDIR" && pwd', folder=tmp_path) == f"{os.path.realpath(tmp_path)}\n"

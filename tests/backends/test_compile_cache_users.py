"""The cache of compiled code among processes and users, each of which runs a script without torch."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from genft_kernels.backends.compiled import cache

COMPILED = Path(cache.__file__).parent
STRANGER = 54321  # a user without a name and without a home
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of other users")

# Compiles by a shell that logs to the folder `notes` and waits while `notes`/wait is there; loads text; without torch.
USER = """
import importlib, importlib.util, os, sys, warnings
compiled, notes, limit, user = sys.argv[1:]
spec = importlib.util.spec_from_file_location("compiled", compiled + "/__init__.py")
sys.modules["compiled"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["compiled"])
cache, run = importlib.import_module("compiled.cache"), importlib.import_module("compiled.run")
import filelock, pathlib, platformdirs
if int(user):
    os.setgroups([])
    os.setgid(int(user))
    os.setuid(int(user))
SCRIPT = 'echo x >> "$0/log"; while [ -e "$0/wait" ]; do sleep 0.02; done; echo machine code > made.so'
def compile(folder):
    run.run("the shell", ["sh", "-c", SCRIPT, notes], 60, folder)
    return folder / "made.so"
library = cache.Library("tiny", "the tiny code", (), compile, pathlib.Path.read_text, float(limit))
print(cache.obtain(library).strip())
print(cache.state(library))
"""


@pytest.fixture
def notes():
    """A folder that any user can read and write."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def start(notes, folder, user=0, limit=60, **environment):
    environment = {**os.environ, "GENFT_CACHE_DIR": str(folder), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", USER, str(COMPILED), str(notes), str(limit), str(user)],
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process):
    """The output and the errors of a process, which must have loaded the code."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.startswith("machine code\n"), err
    return out, err


def runs(notes):
    return (notes / "log").read_text().count("x") if (notes / "log").exists() else 0


def until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def files(folder):
    """Without keys."""
    return sorted(path.stem.partition("-")[0] + path.suffix for path in folder.iterdir())


def test_of_eight_processes_one_compiles(notes):
    folder = notes / "cache with a space"
    (notes / "wait").touch()
    processes = [start(notes, folder) for _ in range(8)]
    until(lambda: runs(notes))
    (notes / "wait").unlink()
    told = [answer(process)[1] for process in processes]
    assert runs(notes) == 1 and sum("compiled the tiny code in" in err for err in told) == 1
    assert files(folder) == ["tiny.json", "tiny.lock", "tiny.so"]


def test_who_waits_too_long_compiles_for_itself(notes):
    folder = notes / "cache"
    (notes / "wait").touch()
    first = start(notes, folder)
    until(lambda: runs(notes))
    second = start(notes, folder, limit=0.2)
    until(lambda: runs(notes) == 2)
    (notes / "wait").unlink()
    answer(first)
    told = answer(second)[1]
    assert "another process compiles the tiny code; waiting" in told and told.count("for itself") == 1


def test_what_a_killed_process_left_is_swept_away(notes):
    folder = notes / "cache"
    (notes / "wait").touch()
    killed = start(notes, folder)
    until(lambda: runs(notes))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list(folder.glob("*.building")) and not list(folder.glob("*.so"))
    (notes / "wait").unlink()  # its shell goes on as well
    answer(start(notes, folder))
    assert runs(notes) == 2 and files(folder) == ["tiny.json", "tiny.lock", "tiny.so"]


@needs_root
def test_what_root_keeps_serves_other_users(notes):
    assert "cached in" in answer(start(notes, notes / "cache"))[0]
    out, err = answer(start(notes, notes / "cache", STRANGER))
    assert err == "" and "cached in" in out and runs(notes) == 1


@needs_root
@pytest.mark.parametrize("kept", ["nothing", "unreadable", "locked folder"])
def test_where_root_keeps_nothing_readable_a_user_compiles_alone(kept, notes):
    (notes / "cache").mkdir()
    if kept != "nothing":
        answer(start(notes, notes / "cache"))
        for path in [notes / "cache"] if kept == "locked folder" else (notes / "cache").glob("*.*o*"):
            path.chmod(0o700)
    out, err = answer(start(notes, notes / "cache", STRANGER))
    assert err.count("UserWarning") == 1 and "Permission denied" in err
    assert kept != "locked folder" or "compiled by each process for itself: " in out


@needs_root
def test_another_users_cache_is_not_loaded_by_root(notes):
    answer(start(notes, notes / "theirs", STRANGER))  # notes is anybody's, the folder is the stranger's
    out, err = answer(start(notes, notes / "theirs"))
    assert f"{notes}/theirs belongs to another user (uid {STRANGER})" in err and err.count("UserWarning") == 1
    assert "for itself" in out and runs(notes) == 2


@needs_root
def test_a_user_without_home_and_name_compiles_alone(notes):
    out, err = answer(start(notes, notes, STRANGER, HOME=None, GENFT_CACHE_DIR=None, XDG_CACHE_HOME=None))
    assert "this user has no home folder" in err and err.count("UserWarning") == 1

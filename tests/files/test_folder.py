"""A folder that is saved into: whatever happens to a saver, it holds one whole adapter, the old one or the new."""

import os
import random
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from genft_kernels import GenFTConfig, apply_genft, load_adapter, save_adapter
from genft_kernels.files import folder
from genft_kernels.files.format import CONFIG_FILE, TENSORS_FILE, read_adapter_file

BOTH = sorted([CONFIG_FILE, TENSORS_FILE])


def base():
    torch.manual_seed(7)
    return nn.ModuleDict({"q": nn.Linear(48, 48), "head": nn.Linear(48, 3)}).eval()


@torch.no_grad()
def filled(value: float):
    """A model whose adapter holds one number only, its configuration too: it tells whole adapters from mixed ones."""
    config = GenFTConfig(shared_dim=8, specific_dim=4, scaling=value, target_modules=["q"], modules_to_save=["head"])
    model = apply_genft(base(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.fill_(value)
    return model


def whole(directory: Path) -> float:
    """The number that the folder's adapter is filled with."""
    adapter = read_adapter_file(directory)
    numbers = {number for tensor in adapter.tensors.values() for number in tensor.unique().tolist()}
    (value,) = {adapter.config.scaling} | numbers
    return value


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# --- one saver ------------------------------------------------------------------------------------------------------

STEPS = 16  # what `interrupted_at` counts in one save


def interrupted_at(step: int, error: BaseException, monkeypatch) -> None:
    """Let the `step`-th call that touches the disk fail, before it has an effect."""
    calls = 0

    def failing(real):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise error
            return real(*args, **options)

        return call

    for name in ("open", "fsync", "replace"):
        monkeypatch.setattr(folder.os, name, failing(getattr(os, name)))


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("exists", [True, False], ids=["over-an-adapter", "into-an-empty-folder"])
def test_an_interrupted_save_leaves_one_whole_adapter(exists, error, tmp_path, monkeypatch):
    first, second, seen = filled(1.0), filled(2.0), set()
    for step in range(STEPS + 1):
        directory = tmp_path / str(step)
        if exists:
            save_adapter(first, directory)
        else:
            directory.mkdir()
        before = contents(directory)
        with monkeypatch.context() as patch:
            interrupted_at(step, error, patch)
            try:
                save_adapter(second, directory)
                failed = False
            except type(error):
                failed = True
        if not exists and failed and not (directory / TENSORS_FILE).exists():
            assert set(contents(directory)) <= {CONFIG_FILE}
            seen.add("none")
        else:
            value = whole(directory)
            seen.add(value)
            assert set(contents(directory)) == set(BOTH)
            if value == 1.0 and isinstance(error, OSError):
                assert contents(directory) == before
        save_adapter(second, directory)
        assert whole(directory) == 2.0 and set(contents(directory)) == set(BOTH)
    assert not failed  # at the step after the last
    assert seen == ({1.0, 2.0} if exists else {"none", 2.0})


def test_saving_the_same_again_changes_no_byte(tmp_path):
    save_adapter(filled(1.0), tmp_path)
    before = contents(tmp_path)
    save_adapter(filled(1.0), tmp_path)
    assert contents(tmp_path) == before


def test_files_have_the_rights_of_new_files(tmp_path):
    mask = os.umask(0o027)
    try:
        save_adapter(filled(1.0), tmp_path)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_planted_links_are_not_followed(tmp_path, monkeypatch):
    victim, directory = tmp_path / "victim", tmp_path / "adapter"
    victim.write_text("precious")
    directory.mkdir()
    monkeypatch.setattr(folder.secrets, "token_hex", lambda size: "0" * 2 * size)  # even if names could be foreseen
    staged = [f".{name}.{'0' * 32}" for name in (TENSORS_FILE, CONFIG_FILE)]
    old = [f".{name}.{os.getpid()}" for name in (TENSORS_FILE, CONFIG_FILE, "previous")]
    for name in (TENSORS_FILE, CONFIG_FILE, folder.LOCK_FILE, *staged, *old):
        (directory / name).symlink_to(victim)
    monkeypatch.setattr(folder, "_LEFTOVER", folder.re.compile("nothing"))
    with pytest.raises(FileExistsError):
        save_adapter(filled(1.0), directory)
    assert victim.read_text() == "precious"
    monkeypatch.undo()
    save_adapter(filled(1.0), directory)
    assert victim.read_text() == "precious" and sorted(contents(directory)) == BOTH and whole(directory) == 1.0


def test_leftovers_go_with_the_next_save_and_other_files_stay(tmp_path):
    leftovers = [
        f".{TENSORS_FILE}.{'a1' * 16}",
        f".{CONFIG_FILE}.{'0f' * 16}",
        f".{TENSORS_FILE}.4711",
        ".previous.4711",
    ]
    others = ["README.md", ".gitattributes", f"{TENSORS_FILE}.bak", f".{TENSORS_FILE}.mine"]
    for name in (*leftovers, *others, folder.LOCK_FILE):
        (tmp_path / name).write_text("x")
    save_adapter(filled(1.0), tmp_path)
    assert sorted(contents(tmp_path)) == sorted([*others, *BOTH])


def test_a_saver_that_never_ends_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.05)
    save_adapter(filled(1.0), tmp_path)
    with folder.only_saver(tmp_path), pytest.raises(TimeoutError, match=f"saving into {tmp_path}"):
        save_adapter(filled(2.0), tmp_path)
    assert whole(tmp_path) == 1.0
    save_adapter(filled(2.0), tmp_path)
    assert whole(tmp_path) == 2.0


def test_an_interrupt_while_waiting_holds_no_lock(tmp_path, monkeypatch):
    real = folder.fcntl.flock

    def interrupted(descriptor, how):
        real(descriptor, how)
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.05)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder.fcntl, "flock", interrupted)
        save_adapter(filled(1.0), tmp_path)
    save_adapter(filled(2.0), tmp_path)
    assert whole(tmp_path) == 2.0


def test_a_lock_that_its_holder_has_removed_does_not_count(tmp_path, monkeypatch):
    real, calls = folder.fcntl.flock, []

    def flock(descriptor, how):
        if not calls:
            (tmp_path / folder.LOCK_FILE).unlink()
        calls.append(how)
        real(descriptor, how)

    monkeypatch.setattr(folder.fcntl, "flock", flock)
    with folder.only_saver(tmp_path):
        assert (tmp_path / folder.LOCK_FILE).exists()


@pytest.mark.parametrize("locks", ["no module", "no locks of the file system"])
def test_saving_works_without_locks(locks, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    if locks == "no module":
        monkeypatch.setattr(folder, "fcntl", None)
    else:
        monkeypatch.setattr(folder.fcntl, "flock", refuse)
    (tmp_path / f".{TENSORS_FILE}.{'0' * 32}").write_text("of somebody who may be at work")
    for value in (1.0, 2.0):
        save_adapter(filled(value), tmp_path)
    assert whole(tmp_path) == 2.0 and len(contents(tmp_path)) == 3


def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    synced, fsync, replace = set(), os.fsync, os.replace

    def noting(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checking(source, destination):
        assert os.stat(source).st_ino in synced
        replace(source, destination)
        synced.discard(os.stat(tmp_path).st_ino)

    monkeypatch.setattr(folder.os, "fsync", noting)
    monkeypatch.setattr(folder.os, "replace", checking)
    save_adapter(filled(1.0), tmp_path)
    assert os.stat(tmp_path).st_ino in synced  # the folder too, after the last of them


def test_a_save_over_an_official_folder_or_a_broken_one(tmp_path):
    for number, text in enumerate(("{", '{"peft_type": "GENFT"}', "[]", '{"next": 3}', "\xff")):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / CONFIG_FILE).write_text(text, encoding="latin-1")
        save_adapter(filled(2.0), directory)
        assert whole(directory) == 2.0


# --- several at once ------------------------------------------------------------------------------------------------


def forked(work) -> int:
    """A child process that does `work`, its exit status 0 unless it raises; its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def kill_loop(directory: Path, rounds: int) -> set[float]:
    """SIGKILL a process that saves two adapters in turn, at random times; what was found after each kill."""
    models, chance, found = [filled(1.0), filled(2.0)], random.Random(0), set()
    save_adapter(models[0], directory)

    def save_for_ever():
        while True:
            for model in models:
                save_adapter(model, directory)

    for _ in range(rounds):
        pid = forked(save_for_ever)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found.add(whole(directory))
    load_adapter(base(), directory)
    save_adapter(models[0], directory)
    assert sorted(contents(directory)) == BOTH and whole(directory) == 1.0
    return found


def savers_and_reader(directory: Path, start, seconds: float) -> None:
    """Two savers beside a reader in this process, who always finds one whole adapter."""
    save_adapter(filled(1.0), directory)
    end = time.monotonic() + seconds
    failures, found = [], set()

    def save(value):
        model = filled(value)
        while time.monotonic() < end:
            save_adapter(model, directory)

    wait = start([lambda: save(1.0), lambda: save(2.0)], failures)
    while time.monotonic() < end:
        found.add(whole(directory))
    wait()
    assert not failures and found and found <= {1.0, 2.0} and sorted(contents(directory)) == BOTH


def as_threads(works, failures):
    def guarded(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    return lambda: [thread.join() for thread in threads]


def as_processes(works, failures):
    pids = [forked(work) for work in works]
    return lambda: failures.extend(pid for pid in pids if os.waitpid(pid, 0)[1] != 0)


@pytest.mark.parametrize("rounds", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_killed_saver_leaves_one_whole_adapter(rounds, tmp_path):
    found = kill_loop(tmp_path, rounds)
    assert found <= {1.0, 2.0}


@pytest.mark.parametrize("start", [as_threads, as_processes])
@pytest.mark.parametrize("seconds", [1.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_two_savers_beside_a_reader(start, seconds, tmp_path):
    savers_and_reader(tmp_path, start, seconds)

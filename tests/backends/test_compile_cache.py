"""The cache of compiled code: what is kept, what is trusted, and what happens where nothing can be kept.

The compiler is a function that writes a text, and loading is reading it.
"""

import json
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from genft_kernels.backends import card
from genft_kernels.backends.compiled import cache
from genft_kernels.backends.compiled.run import BuildError

STRANGER = 54321  # a user without a name and without a home


class Compiler:
    """A compiler of texts, which counts."""

    def __init__(self, text="machine code"):
        self.text, self.runs = text, 0

    def __call__(self, folder):
        self.runs += 1
        self.staging = stat.S_IMODE(folder.stat().st_mode)
        (folder / "made.so").write_text(self.text)
        return folder / "made.so"


@pytest.fixture
def compiler():
    return Compiler()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache, yet to be made."""
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path / "cache with a space"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "cache with a space"


def library(compiler, follows_from=("source", 1), load=Path.read_text):
    return cache.Library("tiny", "the tiny code", follows_from, compiler, load, 60)


def names(folder):
    """Of the files in a folder, without keys."""
    return sorted(path.stem.partition("-")[0] + path.suffix for path in folder.iterdir())


def assert_compiled_privately(compiler, folder, reason):
    """It is loaded although the cache cannot be used, with one warning, and leaves nothing behind."""
    before = sorted(folder.rglob("*")) if folder.is_dir() else []
    runs = compiler.runs
    with pytest.warns(
        UserWarning, match=rf"compiled the tiny code for itself, .*{reason}.* Set GENFT_CACHE_DIR"
    ) as told:
        assert cache.obtain(library(compiler)) == compiler.text
    assert len(told) == 1 and compiler.runs == runs + 1
    assert (sorted(folder.rglob("*")) if folder.is_dir() else []) == before
    assert not list(Path(tempfile.gettempdir()).glob("genft_kernels-*"))


def test_a_library_is_compiled_once_and_kept(compiler, folder, capsys):
    assert cache.state(library(compiler)) == f"compiled on first use, kept in {folder}"
    assert not folder.exists()
    assert cache.obtain(library(compiler)) == "machine code"
    told = capsys.readouterr().err
    assert f"genft_kernels: compiling the tiny code in {folder}\n" in told and "compiled the tiny code in " in told
    assert cache.obtain(library(compiler)) == "machine code" and compiler.runs == 1
    assert capsys.readouterr().err == "" and names(folder) == ["tiny.json", "tiny.lock", "tiny.so"]
    (path,) = folder.glob("*.so")
    assert json.loads(path.with_suffix(".json").read_text())["content"] == "the tiny code"
    assert cache.state(library(compiler)) == f"cached in {path}"


def test_what_it_follows_from_is_in_the_name(compiler, folder):
    cache.obtain(library(compiler))
    assert cache.obtain(library(Compiler("other code"), follows_from=("source", 2))) == "other code"
    assert cache.obtain(library(compiler)) == "machine code" and compiler.runs == 1


MANIFESTS = {
    "half a manifest": b'{"sha256": ',
    "null": b"null",
    "a list": b"[]",
    "nothing in it": b"{}",
    "a number": b'{"sha256": 5}',
    "deep": b"[" * 200_000,
    "no text": b"\xff\xfe\x00",
    "empty": b"",
}


@pytest.mark.parametrize("damage", ["truncated", "altered", "no library", "no manifest", *MANIFESTS])
def test_a_damaged_entry_is_compiled_anew(damage, compiler, folder, capsys):
    cache.obtain(library(compiler))
    (path,) = folder.glob("*.so")
    if damage == "truncated":
        path.write_text("machine")
    elif damage == "altered":
        path.write_text("Machine code")
    elif damage == "no library":
        path.unlink()
    elif damage == "no manifest":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_bytes(MANIFESTS[damage])
    capsys.readouterr()
    cache.state(library(compiler))
    assert cache.obtain(library(compiler)) == "machine code" and compiler.runs == 2
    told = capsys.readouterr().err
    assert damage.startswith("no ") or told.count(f"{path} cannot be loaded: {path.stem}.") == 1
    assert cache.obtain(library(compiler)) == "machine code" and compiler.runs == 2


@pytest.mark.parametrize("error", [OSError("no such symbol"), ImportError("not a module"), AttributeError("no name")])
def test_what_does_not_load_is_an_error(error, compiler, folder):
    def load(path):
        raise error

    with pytest.raises(BuildError, match=f"tiny-.*so cannot be loaded: {error}"):
        cache.obtain(library(compiler, load=load))


def test_a_compiler_that_writes_nothing_is_an_error(folder):
    with pytest.raises(BuildError, match=r"said nothing and wrote no made\.so"):
        cache.obtain(library(lambda staging: staging / "made.so"))
    assert names(folder) in ([], ["tiny.lock"])


def test_a_compiler_that_fails_leaves_nothing(folder):
    def fail(staging):
        (staging / "half").write_text("half")
        raise BuildError("no such standard")

    with pytest.raises(BuildError, match="no such standard"):
        cache.obtain(library(fail))
    assert names(folder) in ([], ["tiny.lock"])


def test_files_appear_whole_the_manifest_last(compiler, folder, monkeypatch):
    appeared = []

    def replace(whole, target):
        assert whole.parent.suffix == ".building" and whole.stat().st_size > 0 and not target.exists()
        appeared.append(target.suffix)
        os.rename(whole, target)

    monkeypatch.setattr(cache.os, "replace", replace)
    cache.obtain(library(compiler))
    assert appeared == [".so", ".json"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o644), (0, 0o644)])
def test_files_follow_the_umask_and_are_nobody_elses_to_write(umask, mode, compiler, folder):
    before = os.umask(umask)
    try:
        cache.obtain(library(compiler))
    finally:
        os.umask(before)
    (path,) = folder.glob("*.so")
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, path.with_suffix(".json"))] == [mode, mode]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755 & ~umask and compiler.staging == 0o700
    assert cache.obtain(library(compiler)) and compiler.runs == 1


@pytest.mark.parametrize("place", ["", ".so", ".json"])
@pytest.mark.parametrize("fault", ["owner", "group", "others", "sticky"])
def test_what_others_may_write_is_not_loaded(place, fault, compiler, folder):
    cache.obtain(library(compiler))
    path = folder / f"{library(compiler).entry}{place}" if place else folder
    if fault == "owner":
        if os.geteuid():
            pytest.skip("only root can make files of other users")
        os.chown(path, STRANGER, -1)
    else:
        path.chmod(path.stat().st_mode | {"group": 0o020, "others": 0o002, "sticky": 0o1002}[fault])
    reason = "belongs to another user" if fault == "owner" else "can be written by others"
    assert_compiled_privately(compiler, folder, f"{path} {reason}")
    assert f"compiled by each process for itself: {path} {reason}" in cache.state(library(compiler))


def test_a_folder_that_others_may_write_is_not_written(compiler, folder):
    folder.mkdir()
    folder.chmod(0o777)
    assert_compiled_privately(compiler, folder, "can be written by others")


def test_a_folder_that_cannot_be_made_is_not_used(compiler, folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # no folder can be made below a file, not even by root
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert_compiled_privately(compiler, tmp_path / "file", "Not a directory")


def test_a_folder_mounted_noexec_is_not_used(compiler, folder, monkeypatch):
    class Mount:
        f_flag = os.ST_NOEXEC

    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: Mount if Path(path) == folder else real(path))
    folder.mkdir()
    assert_compiled_privately(compiler, folder, "is mounted noexec")


def test_nothing_is_compiled_where_files_have_no_owners(compiler, folder, monkeypatch):
    """As on Windows; what was found out about a card is still read there."""
    folder.mkdir()
    card.write(folder / "found.json", {"a": 1})
    monkeypatch.delattr(os, "statvfs")
    monkeypatch.delattr(os, "geteuid")
    for ask in (cache.obtain, cache.state):
        with pytest.raises(BuildError, match="on Linux and macOS alone"):
            ask(library(compiler))
    assert compiler.runs == 0 and card.read(folder / "found.json") == {"a": 1}


def test_a_filesystem_without_locks_is_not_used(compiler, folder, monkeypatch):
    def refuse(lock, **options):
        if folder in Path(lock.lock_file).parents:
            raise NotImplementedError("no flock here")
        return acquire(lock, **options)

    import filelock

    acquire = filelock.FileLock.acquire
    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    folder.mkdir()
    assert_compiled_privately(compiler, folder, "no flock here")


@pytest.mark.parametrize("answer", ["error", "~/.cache"])
def test_a_user_without_a_home_compiles_alone(answer, compiler, folder, monkeypatch):
    def user_cache_dir(*names, **options):
        if answer == "error":
            raise RuntimeError("could not determine the home directory")
        return answer

    monkeypatch.delenv("GENFT_CACHE_DIR")
    monkeypatch.setattr("platformdirs.user_cache_dir", user_cache_dir)
    assert_compiled_privately(compiler, folder, "this user has no home folder")
    assert cache.state(library(compiler)) == "compiled by each process for itself: this user has no home folder"


def test_no_temporary_folder_is_needed_where_the_cache_can_be_used(compiler, folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    assert cache.obtain(library(compiler)) == "machine code"


def test_no_place_at_all_is_an_error(compiler, folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with pytest.raises(BuildError, match="no place to compile the tiny code: .*file/cache.*; .*/nonexistent"):
        cache.obtain(library(compiler))
    assert compiler.runs == 0


@pytest.mark.parametrize("value", ["", "relative/folder", __file__])
def test_a_bad_cache_folder_names_the_variable(value, compiler, monkeypatch):
    monkeypatch.setenv("GENFT_CACHE_DIR", value)
    with pytest.raises(BuildError, match=f"GENFT_CACHE_DIR must be .*; got {value!r}"):
        cache.obtain(library(compiler))


def test_a_cache_folder_of_ones_own_asks_nobody_for_the_users(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "platformdirs", None)  # importing it is an error
    assert cache.cache_folder() == folder

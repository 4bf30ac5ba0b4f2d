"""The benchmarks' rows on disk, the commands, and the report."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.layer import harness
from benchmarks.layer.__main__ import main as bench
from benchmarks.layer.providers import PROVIDERS
from benchmarks.measure import environment
from benchmarks.measure.rows import RESULTS, ResultStore, folder_name, read_rows, upsert_rows, write_rows
from benchmarks.report import __main__ as report
from benchmarks.report import six_bars
from genft_kernels.files import folder
from tests.helpers.small_benchmarks import CPU, case, measure, of, select, wrong

ROOT = Path(__file__).parents[2]

# --- rows on disk ---------------------------------------------------------------------------------------------------


def test_the_store_replaces_by_key_and_is_on_disk_at_once(tmp_path):
    store = ResultStore("Some CPU(R) @ 2, 2 threads", "layer", ("a", "b"), tmp_path)
    store.upsert([{"a": 1, "b": 1, "time": 5}, {"a": 1, "b": 2, "time": 6}])
    store.upsert([{"a": 1, "b": 1, "time": 7}])
    assert store.path.parent.name == "some-cpu-2-2-threads"
    again = ResultStore("Some CPU(R) @ 2, 2 threads", "layer", ("a", "b"), tmp_path)
    assert [row["time"] for row in again] == [7, 6] and again.get({"a": 1, "b": 2})["time"] == 6
    assert list(store.path.parent.iterdir()) == [store.path]  # no partial file is left


def test_two_measuring_commands_keep_each_others_rows(tmp_path):
    first, second = (ResultStore("device", "layer", ("a",), tmp_path) for _ in range(2))
    first.upsert([{"a": 1, "time": 5}, {"a": 2, "time": 6}])
    second.upsert([{"a": 2, "time": 7}, {"a": 3, "time": 8}])
    first.upsert([{"a": 4, "time": 9}])
    assert [(row["a"], row["time"]) for row in read_rows(first.path)] == [(1, 5), (2, 7), (3, 8), (4, 9)]
    assert first.get({"a": 3}) == {"a": 3, "time": 8}  # so that a run which the other has made is not made again


def test_rows_that_are_written_at_the_same_moment_are_all_kept(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [{"a": number} for number in range(60)]
    with ThreadPoolExecutor(4) as writers:
        list(writers.map(lambda row: upsert_rows(path, ("a",), [row]), rows))
    assert sorted(read_rows(path), key=lambda row: row["a"]) == rows
    assert list(tmp_path.iterdir()) == [path]  # neither the lock nor a partial file


def test_processes_wait_for_each_other_to_write_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.05)
    with folder.only_saver(tmp_path), pytest.raises(TimeoutError, match=f"saving into {tmp_path}"):
        upsert_rows(tmp_path / "rows.jsonl", ("a",), [{"a": 1}])
    assert not (tmp_path / "rows.jsonl").exists()


def test_fields_of_a_run_are_written_once(tmp_path):
    first, second = {"device": "A", "commit": "1", "torch": None}, {"device": "A", "commit": "2"}
    rows = [{"a": 1} | first, {"a": 2} | second, {"a": 3} | first, {"a": 4}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines[:2] == [{"run": {"id": 0, **first}}, {"run": {"id": 1, **second}}]
    assert lines[2:] == [{"a": 1, "run": 0}, {"a": 2, "run": 1}, {"a": 3, "run": 0}, {"a": 4}]
    (tmp_path / "rows.jsonl").write_text('{"a": 1, "run": 7}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 1: no run 7"):
        read_rows(tmp_path / "rows.jsonl")


def test_the_committed_rows_are_few_and_each_is_read():
    paths = sorted(RESULTS.rglob("*.*"))
    assert {path.suffix for path in paths} == {".jsonl", ".txt"}  # a text is what a script printed once
    assert sum(len(path.read_text().splitlines()) for path in paths) <= 3000
    assert all(read_rows(path) for path in paths if path.suffix == ".jsonl")


def test_a_broken_file_is_named_and_left_alone(tmp_path):
    path = tmp_path / "device" / "layer.jsonl"
    path.parent.mkdir()
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match="layer.jsonl, line 2: not JSON"):
        ResultStore("device", "layer", ("a",), tmp_path)
    assert path.read_text() == '{"a": 1}\n{"a": \n'


def test_folder_names():
    assert folder_name("NVIDIA H200") == "nvidia-h200"
    assert folder_name("Intel(R) Xeon(R) Processor, 2 threads") == "intel-xeon-processor-2-threads"


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "lora"], "invalid choice: 'lora'"),
        (["--layer", "gpt"], "--layer"),
        (["--tokens", "0"], "must be above 0"),
        (["--tokens", "many"], "invalid whole number"),
        (["--seconds", "-1"], "must be above 0"),
        (["--k", "9"], "--k"),
        (["--form", "low-rank"], "--form"),
        (["--device", "abacus"], "--device"),
        (["--device", "mps"], "must be cpu or cuda"),
    ],
)
def test_bad_arguments_are_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


ARGUMENTS = ["--device", "cpu", "--layer", "roberta-base-qv", "--tokens", "7", "--seconds", "0.01"]


def test_the_command_measures_and_writes(tmp_path, capsys):
    names = ["frozen", "peft-lora", "genft-triton"]
    assert bench([*ARGUMENTS, "--provider", *names, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/layer.jsonl")
    rows = read_rows(path)
    assert [row["provider"] for row in rows] == ["genft-triton", "peft-lora", "frozen"]
    assert {row["tokens"] for row in rows} == {7}
    printed = capsys.readouterr().out
    assert "genft-triton: unavailable: it needs a CUDA device" in printed.splitlines()[1]


def test_a_resumed_run_leaves_out_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "sources", lambda: "one")
    arguments = [*ARGUMENTS, "--provider", "frozen", "genft-triton", "--output", str(tmp_path), "--resume"]
    assert bench(arguments) == 0 and "1 cases" in capsys.readouterr().out
    assert bench(arguments) == 0 and "0 cases" in capsys.readouterr().out
    assert bench([*arguments, "--provider", "frozen", "peft-lora"]) == 0 and "1 cases" in capsys.readouterr().out
    monkeypatch.setattr(environment, "sources", lambda: "two")
    assert bench(arguments) == 0 and "1 cases" in capsys.readouterr().out


def test_a_broken_result_file_is_an_error_not_overwritten(tmp_path, capsys):
    path = tmp_path / folder_name(environment.device_name(CPU)) / "layer.jsonl"
    path.parent.mkdir()
    path.write_text("not JSON\n")
    with pytest.raises(SystemExit, match="2"):
        bench([*ARGUMENTS, "--output", str(tmp_path)])
    assert "line 1: not JSON" in capsys.readouterr().err and path.read_text() == "not JSON\n"


def test_measuring_does_not_begin_where_rows_cannot_be_written(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit, match="2"):
        bench([*ARGUMENTS, "--output", str(tmp_path / "taken")])
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and "taken" in output.err and not output.out


def test_an_interrupted_run_keeps_the_finished_rows(tmp_path, monkeypatch, capsys):
    finished = measure(select(["frozen"]))

    def interrupted(*settings):
        yield from finished
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run", interrupted)
    assert bench([*ARGUMENTS, "--output", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*/layer.jsonl")
    assert read_rows(path) == json.loads(json.dumps(finished)) and "interrupted" in capsys.readouterr().err


def test_a_red_gate_makes_the_command_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROVIDERS, "frozen", dataclasses.replace(wrong("y"), name="frozen"))
    assert bench([*ARGUMENTS, "--provider", "frozen", "--output", str(tmp_path)]) == 1
    assert "wrong: y is off by 0.01" in capsys.readouterr().out


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Rows of a small run, one of them wrong, and a README to write into."""
    store = ResultStore("Test Device", "layer", harness.KEY, tmp_path)
    names = ["two-product-floor", "genft-eager", "genft-eager-token-side", "genft-triton", "official", "peft-lora"]
    store.upsert(measure([*select(names), wrong("dx")], *[case(tokens=tokens) for tokens in (8, 33)]))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    small = six_bars.Bar("one small layer", "layer", ("small", 96, 64, 33, "float32", 8, "factored"))
    absent = six_bars.Bar("one large layer", "layer", ("large", 960, 64, 33, "float32", 8, "factored"))
    monkeypatch.setattr(six_bars, "CPU_BARS", (small, absent))
    return tmp_path, store


def test_the_report_is_made_of_the_rows(results):
    folder, store = results
    written = report.write_report(folder, folder)
    assert {path.name for path in written} == {"six_bars.png", "results.md", "README.md"}
    text, readme = (folder / "docs" / "results.md").read_text(), (folder / "README.md").read_text()
    assert "- wrong dx: wrong: dx is off by" in text or "- wrong: wrong: dx is off by" in text
    assert "- GenFT triton: unavailable: it needs a CUDA device, not cpu\n" in text
    row = of([row for row in store if row["tokens"] == 33], "peft-lora")
    assert f"{row['time_ms']['both'][1]:.3g}" in text
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    genft, given, official = (
        of([row for row in store if row["tokens"] == 33], name)["ratios"]["peft-lora"][1]
        for name in ("genft-eager", "genft-eager-token-side", "official")
    )
    line = f"| one small layer | {row['device']} | {genft:.2f} | {given:.2f} | {official:.2f} |"
    assert line in readme and "one large layer" not in readme and "(docs/six_bars.png)" in readme
    assert (folder / "docs" / "six_bars.png").read_bytes().startswith(b"\x89PNG")
    report.write_report(folder, folder)
    assert (folder / "README.md").read_text() == readme


def test_the_committed_report_is_that_of_the_committed_rows(tmp_path):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    report.write_report(RESULTS, tmp_path)
    for name in ("README.md", "docs/results.md"):
        stale = f"{name} is not that of benchmarks/results: make bench-report"
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), stale


def test_every_device_has_its_section_and_its_bars(results):
    folder, store = results
    card = ResultStore("A Card", "layer", harness.KEY, folder)
    card.upsert(row | {"device": "A Card"} for row in store)
    report.write_report(folder, folder)
    text, readme = (folder / "docs" / "results.md").read_text(), (folder / "README.md").read_text()
    assert "## A Card\n" in text and text.count("### One layer") == 2 and readme.count("| one small layer |") == 2


def test_the_report_says_what_it_lacks(results, tmp_path):
    folder, _ = results
    (folder / "README.md").write_text("no markers")
    with pytest.raises(report.ReportError, match="needs the lines"):
        report.write_report(folder, folder)
    with pytest.raises(report.ReportError, match="run make bench first"):
        report.write_report(tmp_path / "nothing", folder)
    with pytest.raises(SystemExit) as stop:
        report.main(["--results", str(tmp_path / "nothing")])
    assert stop.value.code == 2


def test_two_runs_are_compared(results, tmp_path, capsys):
    _, store = results
    second = ResultStore("second", "layer", harness.KEY, tmp_path)
    second.upsert(json.loads(json.dumps(row)) for row in store)
    slower = of([row for row in second if row["tokens"] == 8], "official")
    slower["ratios"]["peft-lora"][1] *= 1.5
    second.upsert([slower])
    assert report.main(["--compare", str(store.path), str(second.path)]) == 1
    (found,) = read_rows(store.path.with_name("agreement.jsonl"))
    assert found["worst"] == pytest.approx(0.5) and found["median"] == 0 and found["within_10_percent"] < 1
    assert report.main(["--compare", str(store.path), str(store.path)]) == 0
    with pytest.raises(SystemExit, match="2"):
        report.main(["--compare", str(store.path), str(tmp_path / "absent.jsonl")])
    assert "no ratio in common" in capsys.readouterr().err


@pytest.mark.slow
def test_the_pytest_suite_runs_over_the_registry():
    command = ["pytest", "benchmarks", "--benchmark-only", "-q", "-k", "factored and forward and (frozen or triton)"]
    # pytest-benchmark would not measure in what it takes for a worker of pytest-xdist.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "unavailable: it needs a CUDA device" in done.stdout

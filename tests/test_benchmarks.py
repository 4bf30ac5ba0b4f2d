"""The benchmark harness: its gate, its measures, its rows. Nothing here looks at how fast anything is."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import (
    agreement,
    environment,
    genft_providers,
    harness,
    lora_providers,
    memory,
    report,
    tables,
    third_party,
    timing,
)
from benchmarks.__main__ import main as bench
from benchmarks.cases import FORMS, LAYERS, Case, Layer, cpu_cases, gpu_grid
from benchmarks.gate import Expected, WrongResult
from benchmarks.problem import Problem
from benchmarks.providers import PROVIDERS, Provider, select
from benchmarks.results_store import ResultStore, folder_name, read_rows
from genft_kernels import GenFTConfig, GenFTGenerator, GenFTLinear

CPU = torch.device("cpu")
SMALL = Layer("small", 96, 64, 4)
ROOT = Path(__file__).parents[1]


def case(form="factored", dtype="float32", tokens=33, k=8, layer=SMALL):
    return Case(layer, tokens, dtype, k, form)


def measure(providers, *cases):
    return list(harness.run(providers, cases or [case()], CPU, seconds=0.01))


def of(rows, provider, direction="both"):
    (row,) = [row for row in rows if row["provider"] == provider and row["direction"] == direction]
    return row


# --- providers and the gate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
# Compiled: one form below. CUDA: its kernels run on a CPU in tests of their own.
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "official-compiled" and "cuda" not in name])
def test_every_provider_passes_its_gate(name, form, dtype):
    which, provider = case(form, dtype), PROVIDERS[name]
    if reason := provider.obstacle(which, CPU):
        pytest.skip(f"{provider.name}: {reason}")
    harness.gated_workload(provider, which, CPU)


@pytest.mark.filterwarnings("ignore")  # of the compiler's
def test_the_compiled_official_way_passes_its_gate():
    row = of(measure(select(["official-compiled"]), case("dropout")), "official-compiled")
    assert row["status"] == "measured", row


def _wrong(what):
    """The frozen layer, with one thing wrong."""

    def build(problem):
        workload = genft_providers.frozen(problem)
        weight = problem.weight

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return F.linear(x, weight) * (1.01 if what == "y" else 1)

            @staticmethod
            def backward(ctx, dy):
                dx = dy @ weight
                if what == "nan":
                    dx[0, 0] = float("nan")
                return dx * (1.01 if what == "dx" else 1)

        return dataclasses.replace(workload, function=lambda: Wrong.apply(problem.x))

    return Provider("wrong", f"wrong {what}", build)


@pytest.mark.parametrize("what", ["y", "dx", "nan"])
def test_a_wrong_provider_is_not_timed_and_loses_its_rows(what, tmp_path):
    store = ResultStore("device", "layer", harness.KEY, tmp_path)
    right = dataclasses.replace(PROVIDERS["frozen"], name="wrong")
    for row in measure([right]):
        harness.record(store, row)
    assert [row["direction"] for row in store] == ["forward", "backward", "both"]
    rows = measure([_wrong(what), PROVIDERS["peft-lora"]])
    for row in rows:
        harness.record(store, row)
    (left,) = [row for row in store if row["provider"] == "wrong"]
    assert left["status"] == "wrong" and left["reason"].startswith("y " if what == "y" else "dx ")
    assert "time_ms" not in left
    assert of(rows, "peft-lora")["status"] == "measured"  # the others are measured all the same
    for row in measure([right]):  # and put right, the refusal goes
        harness.record(store, row)
    assert all(row["status"] == "measured" for row in store)


def test_a_result_of_another_shape_or_name_is_wrong():
    problem = Problem(case(), CPU)
    workload = PROVIDERS["frozen"].build(problem)
    expected = Expected.of(workload, torch.float32)
    transposed = dataclasses.replace(workload, function=lambda: F.linear(problem.x, problem.weight)[:-1])
    transposed.grads = (problem.dy[:-1],)
    with pytest.raises(WrongResult, match=r"y has shape \[32, 64\] and not \[33, 64\]"):
        expected.check(transposed, torch.float32)
    renamed = dataclasses.replace(workload, leaves={"z": problem.x})
    with pytest.raises(WrongResult, match="gives y, dz and not y, dx"):
        expected.check(renamed, torch.float32)


def test_a_provider_that_raises_does_not_end_the_run():
    def build(problem):
        raise RuntimeError("no such kernel")

    rows = measure([Provider("broken", "broken", build), PROVIDERS["frozen"]])
    assert of(rows, "broken", None)["reason"] == "RuntimeError: no such kernel"
    assert of(rows, "frozen")["status"] == "measured"


def test_what_cannot_run_says_why():
    rows = measure(select(["genft-triton", "frozen"]))
    row = of(rows, "genft-triton", None)
    assert row["status"] == "unavailable" and "CUDA" in row["reason"]
    assert harness.unavailable(select(["genft-triton", "frozen"]), [case()], CPU) == {"genft-triton": row["reason"]}


def test_rows_say_where_they_come_from():
    names = ["two-product-floor", "three-product-floor", "frozen", "peft-lora", "genft-eager"]
    rows = measure(select(names), case("tiled"))
    row = of(rows, "genft-eager")
    assert {"device", "commit", "torch", "python", "genft_kernels", "peft"} <= row.keys()
    assert (row["in"], row["out"], row["tokens"], row["dtype"], row["k"]) == (96, 64, 33, "float32", 8)
    assert row["time_ms"] == sorted(row["time_ms"]) and row["time_ms"][0] > 0 and row["samples"] >= 7
    assert set(row["ratios"]) == {"two-product-floor", "three-product-floor", "frozen", "peft-lora"}
    for name, floor in (("genft-eager", "three-product-floor"), ("peft-lora", "two-product-floor")):
        measured = of(rows, name)  # each by the products that it needs itself
        assert measured["floor_fraction"] == pytest.approx(1 / measured["ratios"][floor][1], abs=1e-3)
    assert row["launches"] is None  # a CPU launches nothing


def test_delta_gain_tells_who_swallows_a_small_update():
    names = ["genft-eager", "official", "peft-lora", "fused-lora-eager"]
    rows = measure(select(names), case(dtype="bfloat16", tokens=400, layer=Layer("gain", 256, 192, 4)))
    for name in ("genft-eager", "fused-lora-eager"):
        assert 0.95 < of(rows, name)["gain_y"] < 1.05 and 0.95 < of(rows, name)["gain_dx"] < 1.05
    for name in ("peft-lora", "official"):
        assert of(rows, name)["gain_y"] < 0.8 and of(rows, name)["gain_dx"] < 0.8


# --- cases ----------------------------------------------------------------------------------------------------------


def test_the_rank_of_equal_parameters_trains_as_much():
    for which in (case(k=26, layer=LAYERS["roberta-base-qv"]), case(k=37, layer=LAYERS["llama3-8b-v"])):
        layer, (shared, specific) = which.layer, which.split
        config = GenFTConfig(shared_dim=shared, specific_dim=specific, zero_delta=False)
        generator = GenFTGenerator(layer.in_features, layer.out_features, config, device="meta")
        linear = GenFTLinear(layer.in_features, layer.out_features, False, generator=generator, device="meta")
        trained = {id(p): p.numel() for p in linear.parameters() if p.requires_grad}
        in_generator = sum(p.numel() for p in generator.parameters())
        total = in_generator + layer.count * (sum(trained.values()) - in_generator)
        lora = which.rank_of_equal_parameters * (layer.in_features + layer.out_features) * layer.count
        assert abs(lora - total) <= (layer.in_features + layer.out_features) * layer.count / 2


def test_the_cases_cover_what_they_should():
    grid = list(gpu_grid())
    assert len(set(grid)) == len(grid) == 6 * 3 * 5 * 4
    assert {each.tokens for each in grid} == {1, 16, 128, 1024, 8192, 32768}
    small = cpu_cases()
    assert {each.form for each in small} == set(FORMS) and {each.dtype_name for each in small} == {
        "float32",
        "bfloat16",
    }
    assert any(each.layer.in_features != each.layer.out_features for each in small)


def test_of_a_full_grid_the_report_shows_one_case_for_each_layer_and_form():
    cases = [tuple(each.key.values()) for each in gpu_grid()]
    shown = tables.telling(cases)
    assert len(shown) == 5 * 3 and {each[3] for each in shown} == {8192} and {each[5] for each in shown} == {8}
    assert tables.telling(cases[:12]) == cases[:12]


# --- measures -------------------------------------------------------------------------------------------------------


def test_kept_bytes_count_each_storage_once_and_nothing_that_is_there_anyway():
    x, w = torch.randn(10, 20, requires_grad=True), torch.randn(20, 20)
    assert memory.kept_bytes(lambda: F.linear(x, w), (x, w)) == 0

    def shared():
        y = x.exp()  # keeps its result
        return y * y.t().reshape(10, 20).sum() + y.tanh()

    assert memory.kept_bytes(shared, (x,)) == 2 * 10 * 20 * 4 + 4  # exp's and tanh's results, and the sum


@pytest.mark.parametrize(("form", "matrices"), [("factored", 3), ("tiled", 5), ("dropout", 5)])
def test_the_official_way_keeps_matrices_of_the_weights_size(form, matrices):
    # rho W, Y1 and sigma D; what psi is applied to in both stages; two masks, which a CPU keeps in the dtype of Y1.
    problem = Problem(case(form, layer=Layer("kept", 512, 512, 4)), CPU)
    kept = memory.workload_kept_bytes(PROVIDERS["official"].build(problem))
    assert 0 < kept - matrices * 512 * 512 * 4 <= 6 * 512 * 8 * 4


def test_peak_bytes_count_what_is_alive_at_once():
    def work():
        first = torch.ones(1000, 1000)
        del first
        return torch.ones(1000, 500)

    assert memory.peak_bytes(work, CPU) == pytest.approx(4_000_000, rel=0.01)
    assert memory.launches(work, CPU) is None


def test_providers_take_turns_and_ratios_stay_within_a_turn():
    order, clock = [], iter(range(1, 1000))

    def timer(name, factor):
        def once():
            order.append(name)
            return {"both": factor * next(clock)}

        return once

    samples = timing.take_turns({"a": timer("a", 1.0), "b": timer("b", 2.0), "c": timer("c", 1.0)}, 0.0, least=3)
    assert order == list("abcbcacab")
    assert [each["both"] for each in samples["b"]] == [4, 8, 18]
    assert timing.ratios(samples["b"], samples["a"], "both") == [4 / 1, 8 / 6, 18 / 8]
    assert timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))


# --- rows on disk ---------------------------------------------------------------------------------------------------


def test_the_store_replaces_by_key_and_is_on_disk_at_once(tmp_path):
    store = ResultStore("Some CPU(R) @ 2, 2 threads", "layer", ("a", "b"), tmp_path)
    store.upsert([{"a": 1, "b": 1, "time": 5}, {"a": 1, "b": 2, "time": 6}])
    store.upsert([{"a": 1, "b": 1, "time": 7}])
    assert store.path.parent.name == "some-cpu-2-2-threads"
    again = ResultStore("Some CPU(R) @ 2, 2 threads", "layer", ("a", "b"), tmp_path)
    assert [row["time"] for row in again] == [7, 6] and again.get({"a": 1, "b": 2})["time"] == 6
    again.discard([{"a": 1, "b": 1}, {"a": 9, "b": 9}])
    assert len(read_rows(store.path)) == 1
    assert list(store.path.parent.iterdir()) == [store.path]  # no partial file is left


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
        (["--provider", "lora"], "no lora"),
        (["--layer", "gpt"], "--layer"),
        (["--tokens", "0"], "must be above 0"),
        (["--tokens", "many"], "invalid whole number"),
        (["--seconds", "-1"], "must be above 0"),
        (["--k", "9"], "--k"),
        (["--form", "low-rank"], "--form"),
        (["--direction", "sideways"], "--direction"),
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
    assert len(rows) == 3 + 3 + 1 and {row["tokens"] for row in rows} == {7}
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
    assert bench([*ARGUMENTS, "--output", str(tmp_path)]) == 2
    assert "line 1: not JSON" in capsys.readouterr().err and path.read_text() == "not JSON\n"


def test_an_interrupted_run_keeps_the_finished_rows(tmp_path, monkeypatch, capsys):
    finished = measure(select(["frozen"]))

    def interrupted(providers, cases, device, **settings):
        yield from finished
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run", interrupted)
    assert bench([*ARGUMENTS, "--output", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*/layer.jsonl")
    assert len(read_rows(path)) == 3 and "interrupted" in capsys.readouterr().err


def test_a_red_gate_makes_the_command_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROVIDERS, "frozen", dataclasses.replace(_wrong("y"), name="frozen"))
    assert bench([*ARGUMENTS, "--provider", "frozen", "--output", str(tmp_path)]) == 1
    assert "wrong: y is off by 0.01" in capsys.readouterr().out


@pytest.fixture
def results(tmp_path):
    """Rows of a small run, one of them wrong, and a README to write into."""
    store = ResultStore("Test Device", "layer", harness.KEY, tmp_path)
    names = [
        "two-product-floor",
        "frozen",
        "genft-eager",
        "genft-eager-token-side",
        "genft-triton",
        "official",
        "peft-lora",
    ]
    cases = [case(tokens=tokens) for tokens in (8, 16, 33)]
    for row in measure([*select(names), _wrong("dx")], *cases):
        harness.record(store, row)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path, store


def test_the_report_is_made_of_the_rows(results):
    folder, store = results
    written = report.write_report(folder, folder / "README.md")
    assert {path.name for path in written} == {"layer.png", "tokens.png", "RESULTS.md", "README.md"}
    text, readme = (folder / "RESULTS.md").read_text(), (folder / "README.md").read_text()
    assert "- wrong: wrong: dx is off by" in text
    assert "- GenFT triton: unavailable: it needs a CUDA device, not cpu\n" in text
    row = next(row for row in store if row["provider"] == "peft-lora" and row["direction"] == "both")
    assert f"{row['time_ms'][1]:.3g}" in text and f"{row['time_ms'][1]:.3g}" in readme
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "test-device/layer.png" in readme
    again = report.write_report(folder, folder / "README.md")
    assert (folder / "README.md").read_text() == readme and len(again) == len(written)


def test_the_report_says_what_it_lacks(results, tmp_path):
    folder, _ = results
    (folder / "README.md").write_text("no markers")
    with pytest.raises(report.ReportError, match="needs the lines"):
        report.write_report(folder, folder / "README.md")
    with pytest.raises(report.ReportError, match="run make bench first"):
        report.write_report(tmp_path / "nothing", folder / "README.md")
    with pytest.raises(SystemExit) as stop:
        report.main(["--results", str(tmp_path / "nothing")])
    assert stop.value.code == 2


def test_agreement_compares_two_runs(results, tmp_path, capsys):
    _, store = results
    rows = [json.loads(json.dumps(row)) for row in store]
    second = ResultStore("second", "layer", harness.KEY, tmp_path)
    for row in rows:
        if row["provider"] == "official" and row["tokens"] == 8 and row["direction"] == "both":
            row["ratios"]["peft-lora"][1] *= 1.5
    second.upsert(rows)
    assert agreement.main([str(store.path), str(second.path)]) == 1
    found = json.loads((store.path.parent / "agreement.json").read_text())
    assert found["worst"] == pytest.approx(0.5) and found["median"] == 0
    assert "official" in capsys.readouterr().out
    assert agreement.main([str(store.path), str(store.path)]) == 0


def test_the_pytest_suite_runs_over_the_registry():
    command = ["pytest", "benchmarks", "--benchmark-only", "-q", "-k", "factored and forward and (frozen or triton)"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "unavailable: it needs a CUDA device" in done.stdout


# --- other packages -------------------------------------------------------------------------------------------------


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(third_party.importlib.util, "find_spec", lambda name: None)
    third_party.unsloth.cache_clear()
    assert PROVIDERS["unsloth-lora"].obstacle(case(), CPU) == (
        "unsloth is not installed (pip install --no-deps unsloth)"
    )
    third_party.unsloth.cache_clear()


def test_only_the_wanted_definitions_are_run(tmp_path, monkeypatch):
    package = tmp_path / "some_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "lora.py").write_text("import nothing_that_exists\nFACTOR = 1\ndef wanted(x):\n    return FACTOR * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = third_party._definitions("some_kernels", {"lora.py": ("wanted",)}, {"FACTOR": 3})
    assert found.wanted(2) == 6
    with pytest.raises(third_party.Missing, match="some_kernels has no other in lora.py"):
        third_party._definitions("some_kernels", {"lora.py": ("other",)}, {})
    with pytest.raises(third_party.Missing, match="has no gone.py"):
        third_party._definitions("some_kernels", {"gone.py": ("wanted",)}, {})


def test_hand_derived_lora_keeps_nothing():
    problem = Problem(case(), CPU)
    assert memory.workload_kept_bytes(lora_providers.hand_derived(problem, 8)) == 0

"""The benchmark harness: its gate, its cases, its measures. Nothing here looks at how fast anything is."""

import dataclasses
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks.layer import harness, third_party
from benchmarks.layer import lora as lora_providers
from benchmarks.layer.cases import DIRECTIONS, FORMS, LAYERS, Layer, cpu_cases, gpu_grid
from benchmarks.layer.problem import Problem
from benchmarks.layer.providers import PROVIDERS, Provider
from benchmarks.measure import memory, timing
from benchmarks.measure.gate import Expected, WrongResult
from benchmarks.measure.rows import ResultStore
from benchmarks.report import layer_tables
from genft_kernels import GenFTConfig, GenFTGenerator, GenFTLinear
from tests.helpers.small_benchmarks import CPU, case, measure, of, select, wrong

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
@pytest.mark.slow
def test_the_compiled_official_way_passes_its_gate():
    row = of(measure(select(["official-compiled"]), case("dropout")), "official-compiled")
    assert row["status"] == "measured", row


@pytest.mark.parametrize("what", ["y", "dx", "nan"])
def test_a_wrong_provider_is_not_timed_and_loses_its_rows(what, tmp_path):
    store = ResultStore("device", "layer", harness.KEY, tmp_path)
    right = dataclasses.replace(PROVIDERS["frozen"], name="wrong")
    store.upsert(measure([right]))
    assert list(of(store, "wrong")["time_ms"]) == ["forward", "backward", "both"]
    rows = measure([wrong(what), PROVIDERS["peft-lora"]])
    store.upsert(rows)
    left = of(store, "wrong")
    assert left["status"] == "wrong" and left["reason"].startswith("y " if what == "y" else "dx ")
    assert "time_ms" not in left
    assert of(rows, "peft-lora")["status"] == "measured"  # the others are measured all the same
    store.upsert(measure([right]))  # and put right, the refusal goes
    assert all(row["status"] == "measured" for row in store)


def test_only_a_lost_device_ends_the_run(monkeypatch):
    """A capture that failed, which harms nothing after it, raises the same class of error."""

    def fail(*args):
        raise torch.AcceleratorError("this failed")

    broken = Provider("broken", "broken", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    rows = measure([broken, PROVIDERS["frozen"]])
    assert of(rows, "broken")["status"] == "failed" and of(rows, "frozen")["status"] == "measured"
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(torch.AcceleratorError):
        measure([broken])


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
    assert of(rows, "broken")["reason"] == "RuntimeError: no such kernel"
    assert of(rows, "frozen")["status"] == "measured"


def test_provider_that_cannot_run_says_why():
    rows = measure(select(["genft-triton", "frozen"]))
    row = of(rows, "genft-triton")
    assert row["status"] == "unavailable" and "CUDA" in row["reason"]
    assert harness.unavailable(select(["genft-triton", "frozen"]), [case()], CPU) == {"genft-triton": row["reason"]}


def test_rows_say_where_they_come_from():
    names = ["two-product-floor", "three-product-floor", "frozen", "peft-lora", "genft-eager"]
    rows = measure(select(names), case("tiled"))
    row = of(rows, "genft-eager")
    assert {"device", "commit", "torch", "python", "genft_kernels", "peft"} <= row.keys()
    assert (row["in"], row["out"], row["tokens"], row["dtype"], row["k"]) == (96, 64, 33, "float32", 8)
    assert list(row["time_ms"]) == ["forward", "backward", "both"]
    assert all(times == sorted(times) and times[0] > 0 for times in row["time_ms"].values())
    assert set(row["ratios"]) == {"peft-lora"} and of(rows, "peft-lora")["ratios"]["peft-lora"] == [1, 1, 1]
    assert row["launches"] is None  # a CPU launches nothing


def test_ratios_are_to_lora_and_to_the_products_that_a_provider_needs_itself(monkeypatch):
    seconds = {"two-product-floor": 1.0, "three-product-floor": 1.5, "peft-lora": 2.0, "genft-eager": 3.0}

    def take_turns(clocks, limit):
        return {name: [dict.fromkeys(DIRECTIONS, seconds[name])] * 2 for name in clocks}

    monkeypatch.setattr(timing, "take_turns", take_turns)
    rows = measure(select(seconds), case("tiled"))
    assert of(rows, "genft-eager")["ratios"] == {"peft-lora": [1.5, 1.5, 1.5]}
    assert of(rows, "genft-eager")["floor_fraction"] == 0.5 and of(rows, "peft-lora")["floor_fraction"] == 0.5
    assert of(measure(select(seconds)), "genft-eager")["floor_fraction"] == pytest.approx(1 / 3, abs=1e-4)


def test_ratios_on_a_gpu_are_to_the_medians_of_those_before(monkeypatch):
    seconds = {"forward": 1.0, "backward": 2.0, "both": 3.0}
    monkeypatch.setattr(timing, "gpu_quantiles", lambda workload, direction, replay: (0.5, seconds[direction], 6.0))
    medians = {"peft-lora": 1.5}
    times, relative = harness._of_gpu(None, case(), medians, "mine")
    assert times["both"] == (0.5, 3.0, 6.0) and [each for _, each, _ in times.values()] == [1, 2, 3]
    assert relative["peft-lora"] == pytest.approx((1 / 3, 2, 4)) and relative["mine"][1] == 1
    assert medians == {"peft-lora": 1.5, "mine": 3.0}


def test_delta_gain_tells_who_swallows_a_small_update():
    names = ["genft-eager", "official", "peft-lora", "fused-lora-eager"]
    rows = measure(select(names), case(dtype="bfloat16", tokens=400, layer=Layer("gain", 256, 192, 4)))
    for name in ("genft-eager", "fused-lora-eager"):
        assert all(0.95 < gain < 1.05 for gain in of(rows, name)["gain"])
    for name in ("peft-lora", "official"):
        assert all(gain < 0.8 for gain in of(rows, name)["gain"])


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


def test_report_of_a_full_grid_shows_one_case_for_each_layer_and_form():
    cases = [tuple(each.key.values()) for each in gpu_grid()]
    shown = layer_tables.telling(cases)
    assert len(shown) == 5 * 3 and {each[3] for each in shown} == {8192} and {each[5] for each in shown} == {8}
    assert layer_tables.telling(cases[:12]) == cases[:12]


# --- measures -------------------------------------------------------------------------------------------------------


def test_kept_bytes_count_each_storage_once_and_nothing_that_is_there_anyway():
    x, w = torch.randn(10, 20, requires_grad=True), torch.randn(20, 20)
    assert memory.kept_bytes(lambda: F.linear(x, w), (x, w)) == 0

    def shared():
        y = x.exp()  # keeps its result
        return y * y.t().reshape(10, 20).sum() + y.tanh()

    assert memory.kept_bytes(shared, (x,)) == 2 * 10 * 20 * 4 + 4  # exp's and tanh's results, and the sum


def test_counting_what_is_kept_keeps_nothing():
    """A graph left alive holds its leaves to the stream that it ran on, and a capture on another one fails."""
    x, seen = torch.randn(10, 20, requires_grad=True), []

    def forward():
        y = x.tanh()
        seen.append(weakref.ref(y))
        return y * x

    memory.kept_bytes(forward)
    assert seen[0]() is None


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


def test_tensors_that_a_captured_backward_reads_outlive_its_capture(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    workload, outputs, alive = PROVIDERS["frozen"].build(Problem(case(), CPU)), [], []
    function = workload.function

    def forward():
        y = function()
        outputs.append(weakref.ref(y))
        return y

    def do_bench(call, quantiles):
        alive.extend(y() is not None for y in outputs)
        return [1.0] * 3

    workload.function = forward
    monkeypatch.setattr(testing, "do_bench", do_bench)
    with mock.patch.object(torch, "cuda"):
        timing.gpu_quantiles(workload, "backward", replay=True)
    assert alive == [True]


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
    assert memory.workload_kept_bytes(lora_providers.way(problem, 8, lora_providers.hand_derived)) == 0


def test_our_own_that_lose_a_small_update_are_refused():
    problem = Problem(case(), CPU)
    harness._check_gain((1.02, 0.97), problem)
    with pytest.raises(WrongResult, match="of a small update 0.53 is left in y and 1.00 in dx"):
        harness._check_gain((0.53, 1.0), problem)
    with pytest.raises(WrongResult):
        harness._check_gain((1.0, float("nan")), problem)

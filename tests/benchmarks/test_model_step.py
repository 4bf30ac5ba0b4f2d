"""Training steps of whole models: what is compared, the gate, the rows and the report. Never how fast anything is."""

import contextlib
import dataclasses
import functools
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.layer import harness
from benchmarks.layer.cases import Case, Layer
from benchmarks.layer.providers import PROVIDERS
from benchmarks.measure import memory
from benchmarks.measure.gate import WrongResult
from benchmarks.measure.rows import ResultStore, read_rows
from benchmarks.report import __main__ as report
from benchmarks.report import step_tables
from benchmarks.step import __main__ as model_step
from benchmarks.step import methods, models
from benchmarks.step.methods import METHODS, USUAL
from benchmarks.step.models import MODELS, StepCase, default_cases
from benchmarks.step.training import Step, check
from genft_kernels.adapted_model import adapted_layers
from tests.helpers import small_benchmarks

CPU = torch.device("cpu")
ROBERTA = MODELS["roberta-base"]
LORA = METHODS["lora-28"]
SMALL = dataclasses.replace(ROBERTA, name="small", sizes=ROBERTA.sizes | models.SMALL | ROBERTA.tiny)


def case(accumulation=1, dtype="float32", model=SMALL):
    return StepCase(model, 2, 5, accumulation, dtype)


def measure(methods, *cases):
    return list(model_step.run(methods, cases or [case()], CPU, seconds=0.01))


def of(rows, method):
    return small_benchmarks.of(rows, method, "method")


def select(*names):
    return [METHODS[name] for name in names]


# --- the gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("roberta-base", "float32"),
        ("roberta-base", "bfloat16"),
        ("vit-b16", "float32"),
        ("llama-7b-4-layers", "bfloat16"),
        ("smollm2-4-layers-all-linear", "float32"),
    ],
)
def test_every_method_passes_its_gate(name, model, dtype):
    check(METHODS[name], case(2, dtype, MODELS[model]), CPU)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's
def test_compiled_methods_pass_theirs_and_are_compared_with_each_other():
    """The seconds of a compiled step are of one graph: it fails where it would break."""
    rows = measure(select("lora-19", "compiled-lora-19", "compiled-genft-fast"))
    row = of(rows, "compiled-genft-fast")
    assert row["status"] == "measured" and row["generations"] is None and row["kept_bytes"] is None
    assert "compiled-lora-19" in row[
        "ratios"
    ] and f"{row['ratios']['compiled-lora-19'][1]:.2f} x LoRA" in model_step.line(row)


def test_compiled_methods_are_measured_when_asked_for():
    assert [method.name for method in model_step._parse([]).methods] == USUAL == list(METHODS)[: len(USUAL)]
    assert not any(METHODS[name].compiled for name in USUAL)
    asked = model_step._parse(["--method", "compiled-genft-fast"])
    assert [method.name for method in asked.methods] == ["compiled-genft-fast"]


def _scaled(model, dropout, factor=1.01, dtypes=(torch.float32, torch.float64, torch.bfloat16)):
    """LoRA whose values are a little too large."""
    LORA.adapt(model, dropout)
    for name, module in model.named_modules():
        if name.endswith("value") and module.weight.dtype in dtypes:
            module.register_forward_hook(lambda module, args, output: output * factor)


@contextlib.contextmanager
def _averaging(model):
    """The mean of two micro-batches in place of their sum."""
    yield
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad / 2


@contextlib.contextmanager
def _leaving_out(model):
    """Nothing reaches the units of one layer."""
    layer = next(iter(adapted_layers(model).values()))
    layer.enabled = False
    yield
    layer.enabled = True


def _wrong(what):
    name, changes = {
        "scale": ("lora-28", {"adapt": _scaled}),
        "sum": ("lora-28", {"context": _averaging}),
        "missing": ("genft-fast-both", {"context": _leaving_out}),
    }[what]
    return dataclasses.replace(METHODS[name], name="wrong", **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["scale", "sum", "missing"])
def test_the_gate_sees_a_wrong_method(what, dtype):
    with pytest.raises(WrongResult, match="no gradient" if what == "missing" else "gradients in float64 are off by"):
        check(_wrong(what), case(2, dtype), CPU)


def test_the_gate_looks_at_the_dtype_that_is_timed():
    adapt = functools.partial(_scaled, factor=3, dtypes=(torch.bfloat16,))
    wrong = dataclasses.replace(METHODS["lora-28"], adapt=adapt)
    check(wrong, case(), CPU)
    with pytest.raises(WrongResult, match="gradients in bfloat16 are off by"):
        check(wrong, case(dtype="bfloat16"), CPU)


def test_a_wrong_method_is_not_timed_and_loses_its_row(tmp_path):
    store = ResultStore("device", step_tables.SUITE, model_step.KEY, tmp_path)
    right = dataclasses.replace(METHODS["lora-28"], name="wrong")
    store.upsert(measure([right]))
    rows = measure([_wrong("scale"), METHODS["lora-28"]])
    store.upsert(rows)
    row = store.get(case().key | {"method": "wrong"})
    assert row["status"] == "wrong" and "lora_" in row["reason"]
    assert "time_ms" not in row and of(rows, "lora-28")["status"] == "measured"


def test_a_method_that_cannot_run_or_raises_does_not_end_the_run(monkeypatch):
    def adapt(model, dropout):
        raise RuntimeError("no such kernel")

    broken = dataclasses.replace(METHODS["genft-fast-both"], name="broken", adapt=adapt)
    version = methods.version
    monkeypatch.setattr(methods, "version", lambda name: None if name == "peft" else version(name))
    rows = measure([broken, *select("lora-28", "genft-fast-both")])
    assert of(rows, "broken")["reason"] == "RuntimeError: no such kernel"
    assert of(rows, "lora-28")["reason"] == "peft is not installed (pip install peft)"
    assert of(rows, "genft-fast-both")["status"] == "measured"


# --- rows -----------------------------------------------------------------------------------------------------------


def test_rows_say_what_was_measured():
    rows = measure(select(*USUAL), case(3))
    assert [row["status"] for row in rows] == ["measured"] * len(USUAL)
    fast, held, official = (
        of(rows, name) for name in ("genft-fast-both", "genft-fast-both-accumulate", "official-fast-both")
    )
    assert (fast["generations"], held["generations"], official["generations"]) == (3, 1, None)
    assert of(rows, "genft-vtab")["generations"] == 3 and of(rows, "genft-vtab-accumulate")["generations"] == 1
    for row in (fast, held):
        assert 0 < row["generator_share"] < 1
    assert official["generator_ms"] is None and of(rows, "lora-28")["generator_ms"] is None
    assert (fast["layers"], fast["width"], fast["k"]) == (2, 64, 28)
    assert fast["trained"] == official["trained"] == 2 * 2 * 24 * 64 + 4 * 2 * 4 * 64
    assert of(rows, "lora-28")["trained"] == 4 * 2 * 28 * 64
    column = of(rows, "genft-fast")
    assert (column["k"], column["trained"]) == (19, 2 * 12 * 64 + 4 * 2 * 7 * 64)
    summed = of(rows, "genft-fast-sum")
    assert (summed["k"], summed["trained"]) == (30, 4 * 12 * 64 + 4 * 4 * 3 * 64)
    assert of(rows, "full")["trained"] > 50_000
    for row in rows:
        assert row["time_ms"] == sorted(row["time_ms"]) and row["time_ms"][0] > 0 and row["samples"] >= 3
        assert row["tokens_per_second"] == pytest.approx(3 * 10 / row["time_ms"][1] * 1e3, rel=1e-2)
        assert set(row["ratios"]) == {
            "lora-19", "lora-28", "lora-30", "lora-37", "official-fast-both", "official-vtab",
        }  # fmt: skip
        assert row["launches_per_layer"] is None and row["peak_bytes"] >= 0  # a CPU launches nothing
        assert {"device", "commit", "torch", "transformers", "peft"} <= row.keys()
    assert of(rows, "lora-28")["ratios"]["lora-28"] == [1, 1, 1]


def test_the_generators_share_is_taken_step_by_step():
    step = SimpleNamespace(case=case(2), method=METHODS["genft-fast-both"], generations=2)
    samples = [{"step": step, "generator": 0.1, "generations": 2} for step in (0.4, 0.8, 0.2)]
    row = model_step._measured(step, {"genft-fast-both": samples})
    assert row["generator_share"] == 0.25 and row["generator_ms"] == 50 and row["time_ms"][1] == 400


def test_a_method_for_several_micro_batches_is_left_out_of_one():
    assert [row["method"] for row in measure(select("genft-fast-both", "genft-fast-both-accumulate"))] == [
        "genft-fast-both"
    ]


def test_kept_bytes_are_of_one_micro_batch_and_see_the_generators_own_graph():
    rows = measure(select("lora-28", "genft-fast-both", "official-fast-both"), case(1), case(2))
    for name in ("lora-28", "genft-fast-both", "official-fast-both"):
        one, two = (row["kept_bytes"] for row in rows if row["method"] == name)
        assert one == two > 0
    model = METHODS["genft-fast-both"].build(SMALL.build(CPU, torch.float32))
    layer = next(iter(adapted_layers(model).values()))
    kept = memory.kept_bytes(
        lambda: layer.generator.group.factors_for(layer, torch.float32, "eager", []), tuple(model.parameters())
    )
    # What tanh was applied to in the first stage, four layers [64, 28]; the rest is made again.
    assert kept == 4 * 64 * 28 * 4


def test_the_growth_of_the_process_is_that_of_the_call():
    size = 64 << 20

    def work():
        torch.ones(size // 4).sum()

    assert size <= memory.process_growth(work) <= 1.2 * size
    assert memory.process_growth(lambda: None) < size // 8


def test_all_linear_adapts_every_linear_layer():
    model = MODELS["smollm2-4-layers-all-linear"]
    step = Step(METHODS["genft-fast"], METHODS["genft-fast"].build(model.build(CPU, torch.float32, tiny=True)), case())
    assert step.layers == len(adapted_layers(step.model)) == 2 * 7
    assert [each.tokens for each in default_cases(CPU) if each.model is model] == [96, 512, 4096]


def test_models_have_the_sizes_they_are_named_after():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in MODELS[name].build(torch.device("meta"), torch.float32).parameters())
            for name in ("roberta-base", "vit-b16")
        }
    assert sizes == {"roberta-base": 124_055_040, "vit-b16": 85_798_656}
    assert {each.accumulation for each in default_cases(CPU)} == {1, 8}
    assert any(each.tokens == 4096 and each.model is ROBERTA for each in default_cases(CPU))
    assert {each.model.name for each in default_cases(torch.device("cuda"))} == {
        "roberta-base", "vit-b16", "llama-7b-4-layers",
    }  # fmt: skip


def test_frozen_weights_are_shared_and_full_fine_tuning_has_its_own():
    base = SMALL.build(CPU, torch.float32)
    weight = "encoder.layer.0.output.dense.weight"
    adapted, full = (METHODS[name].build(base) for name in ("genft-fast-both", "full"))
    assert adapted.get_parameter(weight) is base.get_parameter(weight)
    assert full.get_parameter(weight).data_ptr() != base.get_parameter(weight).data_ptr()
    before = base.get_parameter(weight).clone()
    Step(METHODS["full"], full, case()).run()
    assert torch.equal(base.get_parameter(weight), before)


# --- the command and the report -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "adapters"], "--method"),
        (["--model", "gpt"], "--model"),
        (["--accumulation", "many"], "invalid whole number"),
        (["--accumulation", "-8"], "must be above 0"),
        (["--seconds", "nan"], "must be above 0"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "mps"], "must be cpu or cuda"),
        (["--device", "cpu", "--accumulation", "5"], "match none of the cases"),
    ],
)
def test_bad_arguments_are_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        model_step.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def small_cases(monkeypatch):
    monkeypatch.setattr(model_step, "default_cases", lambda device: [case(1), case(2)])


def test_the_command_measures_and_writes(small_cases, tmp_path, capsys):
    chosen = ["--method", "genft-fast-both", "genft-fast-both-accumulate", "lora-28"]
    assert model_step.main(["--device", "cpu", "--seconds", "0.01", "--output", str(tmp_path), *chosen]) == 0
    (path,) = tmp_path.glob("*/model_step.jsonl")
    rows = read_rows(path)
    assert [(row["accumulation"], row["method"]) for row in rows] == [
        (1, "lora-28"), (1, "genft-fast-both"),
        (2, "lora-28"), (2, "genft-fast-both"), (2, "genft-fast-both-accumulate"),
    ]  # fmt: skip
    assert "x LoRA, generator" in capsys.readouterr().out


def test_where_rows_cannot_be_written_nothing_is_measured(small_cases, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit, match="2"):
        model_step.main(["--device", "cpu", "--output", str(tmp_path / "taken")])
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and "taken" in output.err and "genft-fast-both" not in output.out


def test_a_red_gate_makes_the_command_fail(small_cases, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "lora-28", dataclasses.replace(_wrong("scale"), name="lora-28"))
    command = ["--device", "cpu", "--seconds", "0.01", "--accumulation", "1", "--output", str(tmp_path)]
    assert model_step.main([*command, "--method", "lora-28"]) == 1
    assert "wrong: gradients in float64 are off" in capsys.readouterr().out


def test_an_interrupted_run_keeps_the_finished_rows(small_cases, tmp_path, monkeypatch, capsys):
    finished = measure(select("lora-28"))

    def interrupted(*args):
        yield from finished
        raise KeyboardInterrupt

    monkeypatch.setattr(model_step, "run", interrupted)
    assert model_step.main(["--device", "cpu", "--output", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*/model_step.jsonl")
    assert read_rows(path) == json.loads(json.dumps(finished)) and "interrupted" in capsys.readouterr().err


def test_the_report_is_made_of_the_rows():
    names = ("lora-28", "official-fast-both", "genft-fast-both", "genft-fast-both-accumulate")
    rows = measure([*select(*names), _wrong("scale")], case(1), case(2))
    fast = next(row for row in rows if row["method"] == "genft-fast-both")
    held = of(rows, "genft-fast-both-accumulate")
    lora = next(row for row in rows if row["method"] == "lora-28")
    fast["ratios"]["lora-28"][1], held["ratios"]["lora-28"][1] = 0.87, 0.76
    fast["kept_bytes"], lora["kept_bytes"] = 105, 100
    text, line = step_tables.section(rows), step_tables.summary(rows)
    assert "#### small, 2 × 2 × 5, float32" in text and "2 layers, width 64." in text
    assert "- wrong: wrong: gradients in float64 are off" in text
    assert "| GenFT, fast-both (factored) |" in text and "| 0.87 |" in text and "| 1.05 |" in text
    assert "| 0.87 |" in line and "| 0.76 |" in line and "| 1.05 |" in line


def test_the_report_shows_the_steps_beside_the_layers(tmp_path):
    layers = ResultStore("device", "layer", harness.KEY, tmp_path)
    small = Case(Layer("small", 8, 8, 2), 4, "float32", 8, "factored")
    layers.upsert(harness.run([PROVIDERS["peft-lora"], PROVIDERS["genft-eager"]], [small], CPU, seconds=0.01))
    ResultStore("device", step_tables.SUITE, model_step.KEY, tmp_path).upsert(
        measure(select("lora-28", "genft-fast-both"))
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    report.write_report(tmp_path, tmp_path)
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "### A training step of a whole model" in text and "#### small, 2 × 5, float32" in text
    assert "| small, 2 × 5, float32 |" in text and "transformers " in text

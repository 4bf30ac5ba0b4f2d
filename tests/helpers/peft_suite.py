"""PEFT's own parametrised tests with this package's configuration: `python -m tests.helpers.peft_suite [options]`.

PEFT's source distribution has its tests, but no wheel has. They are copied, our cases are put into their lists, and the
tiny models that they fetch from a hub are made here, with random weights, in a cache folder that looks like the hub's.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from xml.etree import ElementTree

FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_config",
)
# Theirs, into which our cases go.
LISTS = (
    "TEST_CASES",
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES",
    "MIXED_ADAPTER_TEST_CASES",
    "ALL_CONFIG_CLASSES",
    "ALL_CONFIGS",
)
# What fetches an adapter from the hub.
ONLINE = ("test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config")

CASES = '''"""This package's cases, by the lists of PEFT's tests that they belong to."""

from genft_kernels.integrations.peft import PeftGenFTConfig

SMALL = {"shared_dim": 2, "specific_dim": 1, "inner_activation": "tanh", "weight_ratio": "rms"}
TILED = {**SMALL, "outer_activation": "silu"}
# The names are those of VeRA's cases, so that the two can be told side by side.
MLP = [
    ("1", {"target_modules": "lin0"}),
    ("2", {"target_modules": ["lin0"]}),
    ("3", {"target_modules": ["lin1"]}),
    ("4", {"target_modules": ["lin0", "lin1"]}),
    ("5", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("6 tiled", {"target_modules": ["lin0", "lin1"], "outer_activation": "silu"}),
]
CONV1D = {**SMALL, "target_modules": ["conv1d"]}
SAME, OTHER = {"target_modules": ["lin0"], "init_weights": False}, {"target_modules": ["lin1"], "init_weights": False}


def genft(r=8, **options):
    return PeftGenFTConfig(**{**SMALL, "specific_dim": r // 8}, **options)


OURS = {
    "TEST_CASES": [
        *((f"Vanilla MLP {name} GenFT", "MLP", PeftGenFTConfig, {**SMALL, **options}) for name, options in MLP),
        ("Embedding + transformers Conv1D 1 GenFT", "EmbConv1D", PeftGenFTConfig, CONV1D),
    ],
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
        ("GenFT Same", "genft", PeftGenFTConfig, {**SMALL, **SAME}, {**SMALL, **SAME}),
        ("GenFT Different", "genft", PeftGenFTConfig, {**SMALL, **SAME}, {**SMALL, **OTHER}),
        ("GenFT tiled", "genft", PeftGenFTConfig, {**TILED, **SAME}, {**SMALL, **SAME}),
    ],
    "MIXED_ADAPTER_TEST_CASES": [],
    "ALL_CONFIG_CLASSES": [(PeftGenFTConfig, {})],
    "ALL_CONFIGS": [],
}
TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}


def ours(module, name):
    if name == "ALL_CONFIGS":
        return [(PeftGenFTConfig, {**SMALL, "target_modules": None, "task_type": TASKS[module.rpartition(".")[2]]})]
    return OURS[name]
'''


# What does not run for our cases, nor for VeRA's: other methods' matters, and what their models do not have.
SKIPPED = {
    "test_active_adapter",
    "test_disable_adapter_with_bias_warns",
    "test_generate_half_prec",
    "test_generate_with_mixed_adapter_batches",
    "test_merge_layers",
    "test_merge_layers_fp16",
    "test_merge_layers_multi",
    "test_merge_layers_nan",
    "test_mixed_adapter_batches",
    "test_passing_input_embeds_works",
    "test_peft_model_device_map",
    "test_prompt_tuning_sample_vocab_prepare_for_training",
    "test_prompt_tuning_text_prepare_for_training",
    "test_set_requires_grad_prompt_learning_raises",
    "test_training_decoders_layer_indexing",
    "test_training_prompt_learning_tasks",
    "test_weighted_combination_of_adapters",
}
# Each case of VeRA's has one of ours: checked before any is deselected.
CONFTEST = """import re

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    names = {re.sub(r"kwargs\\w*", "kwargs", item.nodeid) for item in items}
    theirs = {name for name in names if re.search(r"(?<![A-Za-z])(VeRA|Vera)", name)}
    ours = {re.sub(r"(?<=-)vera(?=-)", "genft", re.sub("VeRA|Vera(?=Config)", "GenFT", name)) for name in theirs}
    missing = sorted(ours - {name.replace("PeftGenFT", "GenFT") for name in names})
    if missing:
        raise pytest.UsageError(f"{len(missing)} of VeRA's {len(theirs)} cases have none of ours: {missing[:9]}")
"""


def main(arguments: list[str]) -> int:
    """Run them; pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_tests(root)
        make_hub(root / "hub")
        (root / "pytest.ini").write_text("[pytest]\n")
        environment = {**os.environ, "HF_HUB_CACHE": str(root / "hub"), "HF_HUB_OFFLINE": "1"}
        config_tests, case = "tests/test_config.py::TestPeftConfig::", "[PeftGenFTConfig-mandatory_kwargs0]"
        options = ["-q", "--disable-warnings", "-k", "GenFT"]
        options += [f"--deselect={config_tests}{name}{case}" for name in ONLINE]
        files = [f"tests/{name}.py" for name in FILES]
        results = root / "results.xml"
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={results}", *arguments, *files]
        code = subprocess.run(command, cwd=root, env=environment).returncode
        cases = ElementTree.parse(results).iter("testcase") if results.exists() else ()
        skipped = {case.get("name", "").partition("[")[0] for case in cases if case.find("skipped") is not None}
        if new := sorted(skipped - SKIPPED):
            print("skipped, and not in SKIPPED:", *new)
        return code or len(new)


def copy_tests(root: Path) -> None:
    """PEFT's tests in `root`/tests, of the installed version, with our cases."""
    version = importlib.metadata.version("peft")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-binary", ":all:", "--no-build-isolation", f"peft=={version}", "-d", root], check=True)
    with tarfile.open(root / f"peft-{version}.tar.gz") as archive:
        archive.extractall(root, filter="data")
    tests = root / "tests"
    (root / f"peft-{version}" / "tests").rename(tests)
    (tests / "__init__.py").touch()
    (tests / "genft_cases.py").write_text(CASES)
    (root / "conftest.py").write_text(CONFTEST)
    for name in FILES:
        path = tests / f"{name}.py"
        text = re.sub(
            rf"^({'|'.join(LISTS)}) = ([\[(])$",
            lambda match: f'{match[1]} = {match[2]}\n    *ours(__name__, "{match[1]}"),',
            path.read_text(),
            flags=re.MULTILINE,
        )
        # They load adapters onto models with other weights, which GenFT refuses.
        text = re.sub(r"(class DeepMLP\(.*\n.*\n +super\(\).__init__\(\)\n)", r"\1        torch.manual_seed(0)\n", text)
        # Mixed batches have their cases inline: ours in the place of another method's.
        text = text.replace('"GLoRA mixed', '"GenFT mixed').replace("GloraConfig(", "genft(")
        path.write_text(text.replace("\nimport ", "\nfrom .genft_cases import genft, ours\nimport ", 1))
    utilities = tests / "testing_utils.py"  # has it go online for each model's first time
    utilities.write_text(utilities.read_text().replace("override = {}\n", 'override = {"HF_HUB_OFFLINE": "1"}\n'))


def make_hub(cache: Path) -> None:
    """The tiny models, each where the hub's client looks for its name."""
    import torch
    import transformers as t

    # Of two layers; sizes by the names that most configurations share.
    llama = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000)
    bert = {**llama, "max_position_embeddings": 64}
    opt = dict(hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000)
    gpt = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=1000, n_positions=512)
    t5 = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=1000, decoder_start_token_id=0)
    bart = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    bart |= dict(encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=1000, max_position_embeddings=100)
    qwen = {**llama, "num_key_value_heads": 2}
    models = {
        "peft-internal-testing/tiny-random-OPTForCausalLM": (t.OPTForCausalLM, {**opt, "word_embed_proj_dim": 16}),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel": (t.GPT2LMHeadModel, gpt),
        "peft-internal-testing/tiny-random-GPTJForCausalLM": (t.GPTJForCausalLM, {**gpt, "rotary_dim": 4}),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, llama),
        "peft-internal-testing/tiny-dummy-qwen2": (t.Qwen2ForCausalLM, qwen),
        "hf-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, gpt),
        "hf-internal-testing/tiny-random-MistralForCausalLM": (t.MistralForCausalLM, qwen),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (t.Gemma3ForCausalLM, {**qwen, "head_dim": 4}),
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (t.T5ForConditionalGeneration, t5),
        "peft-internal-testing/tiny-random-BartForConditionalGeneration": (t.BartForConditionalGeneration, bart),
        "peft-internal-testing/tiny-random-BertModel": (t.BertModel, bert),
        "peft-internal-testing/tiny-random-RobertaModel": (t.RobertaModel, bert),
        "peft-internal-testing/tiny-random-DebertaModel": (t.DebertaModel, {**bert, "type_vocab_size": 0}),
        "peft-internal-testing/tiny-random-DebertaV2Model": (t.DebertaV2Model, bert),
        "peft-internal-testing/tiny-random-BertForSequenceClassification": (t.BertForSequenceClassification, bert),
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
            t.RobertaForSequenceClassification,
            bert,
        ),
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
            t.LlamaForSequenceClassification,
            {**llama, "pad_token_id": 0},
        ),
    }
    torch.manual_seed(0)
    for name, (kind, sizes) in models.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        kind(kind.config_class(**sizes)).save_pretrained(repository / "snapshots" / "made-here")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("made-here")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Code in README and docs/ works: blocks run, calls fit the functions, commands have their options."""

import ast
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest
import transformers

import genft_kernels
from genft_kernels import GenFTConfig, frozen_weight
from genft_kernels.backends import explain
from genft_kernels.integrations.transformers import AccumulateCallback, AdapterCheckpoints

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {ROOT / "docs" / "results.md"})
PUBLIC = {name: getattr(genft_kernels, name) for name in genft_kernels.__all__}
KNOWN = PUBLIC | {
    f"genft_kernels.{name}": value for name, value in PUBLIC.items()
} | {
    "GenFTConfig.preset": GenFTConfig.preset, "GenFTConfig.for_budget": GenFTConfig.for_budget,
    "GenFTLinear.from_linear": genft_kernels.GenFTLinear.from_linear, "genft_kernels.backends.explain": explain,
    "AccumulateCallback": AccumulateCallback, "AdapterCheckpoints": AdapterCheckpoints,
}  # fmt: skip
EXAMPLE = re.compile(r"(?:GENFT_\w+=\S+ )?python -m (genft_kernels|benchmarks[\w.]*)(.*)")


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def inline(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def misfits(code: str) -> list[str]:
    """The calls in `code` of public functions that do not take such arguments."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []
    found = []
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and (called := KNOWN.get(ast.unparse(call.func))) is not None:
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            try:
                inspect.signature(called).bind_partial(*call.args, **keywords)
                if called == GenFTConfig.preset:
                    inspect.signature(GenFTConfig).bind_partial(**keywords)
            except TypeError as error:
                found.append(f"{ast.unparse(call)}: {error}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_calls_fit_the_functions(page):
    assert not [wrong for code in (*inline(page), *blocks(page)) for wrong in misfits(code)]


def test_a_call_that_fits_no_function_is_found():
    assert misfits("load_adapter(model, dir, backed='eager')") and misfits("GenFTConfig.preset('fast', rank=8)")
    assert not misfits("load_adapter(model, dir, backend=...)") and not misfits("no code at all")


def test_blocks_of_the_docs_run(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(frozen_weight, "_registered", dict(frozen_weight._registered))
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)

    def small_model(*arguments, **options):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", small_model)
    around = {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "BitsAndBytesConfig")}
    ran = 0
    for page in (ROOT / "docs").glob("*.md"):
        for block in blocks(page):
            exec(block, PUBLIC | around | {"name": "base", "model": small_model()})
            ran += 1
    assert ran >= 4


COMMANDS = sorted({code for page in PAGES for code in inline(page) if EXAMPLE.fullmatch(code)})


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests have imported it
@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_its_options(command, monkeypatch, capsys):
    module, words = EXAMPLE.fullmatch(command).groups()
    subcommand = [word for word in words.split()[:1] if not word.startswith("-")]
    monkeypatch.setattr(sys, "argv", [module, *subcommand, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code in (0, None)
    help_text = capsys.readouterr().out
    assert not [option for option in re.findall(r"(--[\w-]+)", words) if option not in help_text]

"""Claims of documents in words are those of the committed rows; measured anew, those may differ."""

import re

import pytest

from benchmarks.measure.rows import RESULTS, read_rows
from benchmarks.report import six_bars
from tests.helpers.claims import claims, said

CPU, GPU = "intel-xeon-processor-2-threads", "nvidia-h200"
BACKENDS, BACKENDS_PAGE = ("eager", "triton", "cuda"), "docs/backends.md"


def layers(device: str) -> list[dict]:
    return [row for row in read_rows(RESULTS / device / "layer.jsonl") if row["status"] == "measured"]


def costs(device: str) -> dict[str, tuple]:
    """Relative to LoRA, by title: GenFT, with the update given, the official way."""
    suites = {suite: read_rows(RESULTS / device / f"{suite}.jsonl") for suite in ("layer", "model_step")}
    return dict(six_bars.measured(suites))


def test_cpu_costs():
    said("a RoBERTa layer in the factored form takes less time than PEFT's LoRA of the same k")
    said("a whole step of 4,096 tokens no more")
    found = costs(CPU)
    assert found["one layer, factored, float32"][0] < 1 and found["one layer, factored, bfloat16"][0] < 1
    assert found["whole step, RoBERTa, 4,096 tokens"][0] <= 1
    said("The tiled form costs more than LoRA on a CPU, too")
    assert found["one layer, tiled, bfloat16"][0] > 1 and found["one layer, dropout, bfloat16"][0] > 1
    said("a layer alone with few tokens several times as much")
    few = [row for row in layers(CPU) if row["tokens"] <= 16 and row["provider"] == "genft-eager"]
    assert few and all(row["ratios"]["peft-lora"][1] > 2 for row in few)


def test_all_linear_costs():
    steps = [row for row in read_rows(RESULTS / CPU / "model_step.jsonl") if "all-linear" in row["model"]]
    (few,) = (row for row in steps if (row["method"], row["batch"]) == ("genft-fast", 1))
    said(f"a step of {few['sequence']} tokens takes {few['ratios']['lora-19'][1]:.2f} times LoRA's")
    decoding = read_rows(RESULTS / CPU / "decode.jsonl")
    ratios = [row["ratios"]["lora"]["token"][1] for row in decoding if row["method"] == "genft"]
    assert len(ratios) == 4
    said(f"unmerged decoding {min(ratios):.2f} to {max(ratios):.2f} times its")


def test_memory_kept_for_backward():
    said("At most a seventh of what the official way keeps for backward is kept, up to 8,192 tokens")
    rows = [row for row in layers(CPU) + layers(GPU) if row["tokens"] <= 8192]
    case = ("device", "layer", "tokens", "dtype", "k", "form")
    official = {tuple(row[key] for key in case): row["kept_bytes"] for row in rows if row["provider"] == "official"}
    mine = [row for row in rows if re.fullmatch(r"genft-(eager|triton|cuda)", row["provider"])]
    assert mine and all(7 * row["kept_bytes"] <= official[tuple(row[key] for key in case)] for row in mine)


def gains(device: str, form: str, provider: str) -> list[float]:
    """Of y and dx, in bfloat16, the lowest first."""
    rows = [row for row in layers(device) if row["dtype"] == "bfloat16" and row["form"] == form]
    return sorted(gain for row in rows if row["provider"] == provider for gain in row["gain"])


def test_gain_in_16_bits():
    said("all of a small update reaches the loss (gain 1.00), on a CPU and on an H200")
    whole = [gains(CPU, form, "genft-eager") for form in ("factored", "tiled", "dropout")]
    whole += [gains(GPU, form, f"genft-{each}") for form in ("factored", "tiled") for each in BACKENDS]
    assert all(found and found == pytest.approx([1] * len(found), abs=0.01) for found in whole)
    for device, tolerance in ((CPU, 0.025), (GPU, 0.005)):
        found = gains(device, "factored", "peft-lora")
        assert found and found == pytest.approx([0.53] * len(found), abs=tolerance)


def test_gpu_costs():
    said(
        "On an H200 what is small waits for Python: a layer that generates for itself alone takes 3.2 times LoRA's time"
    )
    said("(tiled 3.6), more than the official way")
    factored, tiled = (costs(GPU)[f"one layer, LLaMA, {form}"] for form in ("factored", "tiled"))
    assert factored[0] > factored[2] > 1 and tiled[0] > tiled[2] > 1
    assert (round(factored[0], 1), round(tiled[0], 1)) == (3.2, 3.6)


def test_gpu_costs_by_backend():
    rows = {(row["form"], row["provider"]): row for row in layers(GPU)}
    given = [rows["factored", f"genft-{each}-token-side"] for each in BACKENDS]
    low, middle, high = ([row["ratios"]["peft-lora"][place] for row in given] for place in range(3))
    said("`eager` takes {:.2f} times LoRA's time, `triton` {:.2f}, `cuda` {:.2f}".format(*middle), BACKENDS_PAGE)
    assert 1.2 < min(middle) < max(middle) < 1.35
    tiled = min(rows["tiled", f"genft-{each}-token-side"]["ratios"]["peft-lora"][1] for each in BACKENDS)
    said(f"1.2 to 1.3 times with its update given (tiled {tiled:.1f})")
    spread = [f"{a:.2f} to {b:.2f}" for a, b in zip(low, high, strict=True)]
    said("20th to 80th percentiles are {}, {} and {}".format(*spread), BACKENDS_PAGE)
    lora, *apart = (
        row["time_ms"]["forward"][1] + row["time_ms"]["backward"][1] for row in (rows["factored", "peft-lora"], *given)
    )
    said("apart sum to {:.2f}, {:.2f} and {:.2f} of LoRA's".format(*(each / lora for each in apart)), BACKENDS_PAGE)
    whole = {
        form: [rows[form, f"genft-{each}"]["ratios"]["peft-lora"][1] for each in BACKENDS]
        for form in ("factored", "tiled")
    }
    low, high = min(whole["factored"]), max(whole["factored"])
    said(f"a layer alone takes {low:.1f} to {high:.1f} times LoRA's time in the factored form", BACKENDS_PAGE)
    eager, triton, _ = whole["tiled"]
    said(f"{triton:.1f} (`triton`) to {eager:.1f} (`eager`) times in the tiled one", BACKENDS_PAGE)
    official = [rows[form, "official"]["gain"][0] for form in whole]
    said("of the official way's {:.2f} and {:.2f} in y".format(*official), BACKENDS_PAGE)


def test_gpu_profile():
    profile = (RESULTS / GPU / "host_and_device.txt").read_text()
    heads = re.findall(r"^(\w+) (\w+): host (\S+) ms .*, device (\S+) ms in (\d+) launches", profile, re.M)
    assert len(heads) == 4 and all(float(host) > float(device) for _, _, host, device, _ in heads)
    for activation, backend, *figures in heads:
        form = "factored" if activation == "identity" else "tiled"
        said(f"| {form}, `{backend}` | {' | '.join(figures)} |", BACKENDS_PAGE)
    contract = float(re.search(r"([\d.]+) us x1 _contract", profile)[1])
    kernels = [row for row in read_rows(RESULTS / GPU / "kernels.jsonl") if row["status"] == "measured"]
    time = {tuple(row[key] for key in ("backend", "kernel", "form", "tokens")): row["time_us"][1] for row in kernels}
    now = {form: time["triton", "contract", form, 8192] for form in ("tiled", "dropout")}
    few = time["triton", "contract", "tiled", 128]
    said(
        f"tiled, 598 to {now['tiled']:.0f} (dropout 612 to {now['dropout']:.0f}), at 128 tokens 70 to {few:.0f}",
        BACKENDS_PAGE,
    )
    said(f"It was {contract:.0f} in the profile above", BACKENDS_PAGE)
    product, cuda = time["pytorch", "product", None, 8192], time["cuda", "contract", "tiled", 8192]
    said(f"takes {product:.0f}, the `cuda` backend's `contract` {cuda:,.0f}.", BACKENDS_PAGE)
    rows = {form: [time["triton", f"row_{way}", form, None] for way in ("forward", "backward")] for form in now}
    (forward, backward), (masked_forward, masked_backward) = rows["tiled"], rows["dropout"]
    said(f"`row_forward` 387 to {forward:.0f} (dropout 1,020 to {masked_forward:.0f})", BACKENDS_PAGE)
    said(f"`row_backward` 2,102 to {backward:,.0f} (3,192 to {masked_backward:,.0f})", BACKENDS_PAGE)
    said(f"of a model's W 1,294 to {time['triton', 'thin_transposed', None, None]:.0f}", BACKENDS_PAGE)
    thin = [time[backend, "thin_product", None, 128] for backend in ("triton", "cuda")]
    said("of 128 tokens 30 to {:.0f}; the `cuda` backend's of 128 tokens 84 to {:.0f}".format(*thin), BACKENDS_PAGE)


def test_gpu_step():
    rows = read_rows(RESULTS / GPU / "model_step.jsonl")
    steps = {(row["model"], row["accumulation"], row["method"]): row for row in rows}

    def of_lora(row):
        return row["ratios"][f"lora-{row['k']}"][1]

    for model, count, title in (
        ("roberta-base", 1, "RoBERTa-base"),
        ("llama-7b-4-layers", 1, "LLaMA, 4 layers"),
        ("roberta-base", 8, "RoBERTa-base, eight micro-batches"),
    ):
        lora, *others = (
            steps[model, count, name] for name in ("lora-19", "genft-fast", "genft-fast-sum", "official-fast-both")
        )
        cells = [f"{lora['time_ms'][1]:.1f}", *(f"{row['time_ms'][1]:.1f} | {of_lora(row):.2f}" for row in others)]
        said(f"| {title} | {' | '.join(cells)} |", BACKENDS_PAGE)
    fast, accumulated = steps["roberta-base", 1, "genft-fast"], steps["roberta-base", 8, "genft-fast-accumulate"]
    said(f"now {of_lora(accumulated):.2f})", BACKENDS_PAGE)
    said(f"{fast['generator_ms']:.1f} ms of `fast`'s step is its generation", BACKENDS_PAGE)
    large = of_lora(steps["llama-7b-4-layers", 1, "genft-fast"])
    said(f"a bfloat16 step with `fast` takes {of_lora(fast):.2f} times LoRA's (RoBERTa;")
    said(f"LLaMA {large:.2f})")


def test_gpu_run_before():
    text = (RESULTS / GPU / "run_of_6a861a3fdc.txt").read_text()
    found = dict(re.findall(r"^(.*): .*x LoRA ([\d.]+)", text, re.M))
    step, accumulated = (
        f"{float(found[name]):.2f}"
        for name in ("roberta-base, 1 x 64 x 128, genft-fast", "roberta-base, 8 x 64 x 128, genft-fast-accumulate")
    )
    said(f"and {step} times LoRA's time ({accumulated} under `accumulate`", BACKENDS_PAGE)
    factored, tiled = (
        f"{float(found[f'llama-7b-qv, 8192 tokens, {form}, genft-{backend}']):.1f}"
        for form, backend in (("factored", "eager"), ("tiled", "triton"))
    )
    said(f"for itself alone {factored} times LoRA's time where it took 3.2 (tiled, `triton`: {tiled}", BACKENDS_PAGE)
    lora = re.search(r"^roberta-base, 1 x .*lora-19: ([\d.]+) ms", text, re.M)[1]
    said(f"LoRA's RoBERTa step took {float(lora):.1f} ms where it took 41.0", BACKENDS_PAGE)
    tests = re.search(r"GPU tests at \S+: (\d+ passed)", text)[1]
    said(f"{tests} at commit 6a861a3fdc", BACKENDS_PAGE)


def test_gpu_run_after():
    text = (RESULTS / GPU / "run_of_a5cb8759b2.txt").read_text()
    middle, low, high = re.search(r"^roberta.* genft-fast: .*x LoRA (\S+) \[(\S+), (\S+)\]", text, re.M).groups()
    said(f"`fast` {float(middle):.2f} [{float(low):.2f}, {float(high):.2f}] times that", BACKENDS_PAGE)
    lora, fast = (
        float(re.search(f"^captured: {name}: (\\S+) ms", text, re.M)[1]) for name in ("lora-19", "genft-fast")
    )
    said(f"{fast:.1f} ms with `fast` and {lora:.1f} with LoRA, {fast / lora:.2f} times as long", BACKENDS_PAGE)
    said(f"(RoBERTa; {float(middle):.2f} on another host, {fast / lora:.2f} in a CUDA graph;")
    compiled = re.findall(r"^compiled: \S+: (\S+) ms", text, re.M)
    said("it took {1:.1f} ms there, LoRA's {0:.1f}".format(*map(float, compiled)), BACKENDS_PAGE)
    hosts = re.findall(r"^host: \S+: .*quickest (\S+)$", text, re.M)
    said("its quickest step took {1:.1f} ms and LoRA's {0:.1f}".format(*map(float, hosts)), BACKENDS_PAGE)
    assert "29 tests of test_cuda_kernels.py" in text and "mended in cf88da4" in text


def test_compiled_steps_of_a_cpu():
    text = (RESULTS / CPU / "compiled_step.txt").read_text()
    before, since = (f"{float(ratio):.2f}" for ratio in re.findall(r"x LoRA (\S+)$", text, re.M))
    said(f"took {before} times the time of LoRA's before, both compiled, and takes {since} since", BACKENDS_PAGE)
    said(f"takes {since} times compiled LoRA's time where it took {before}", "CHANGELOG.md")
    rows = {(row["batch"], row["method"]): row for row in read_rows(RESULTS / CPU / "model_step.jsonl")}
    few, many = (rows[batch, "compiled-genft-fast"]["ratios"]["compiled-lora-19"][1] for batch in (1, 32))
    said(f"RoBERTa-base with 128 tokens takes {few:.2f}", BACKENDS_PAGE)
    said(f"with 4,096 tokens {many:.2f}.", BACKENDS_PAGE)


def test_gpu_step_profile():
    profile = (RESULTS / GPU / "step_profile.txt").read_text()
    found = re.findall(r"^(\S+): host \S+ ms, device (\S+) ms in (\d+) launches", profile, re.M)
    assert [name for name, *_ in found] == 2 * ["lora-28", "genft-fast", "genft-fast-sum"]
    (_, of_lora, lora), (_, of_fast, fast) = found[3:5]
    said(f"{float(of_fast):.1f} and {float(of_lora):.1f} ms a step, in {fast} and {lora} launches", BACKENDS_PAGE)
    said(f"`fast` took {found[1][2]} launches", BACKENDS_PAGE)


def test_ways_to_one_accumulator():
    lines = (RESULTS / GPU / "one_accumulator.txt").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert len(table) == 8
    for _, *cells in table[2:]:
        pairs = (f"{gain}, {time}" for gain, time in zip(cells[::2], cells[1::2], strict=True))
        said(f" | {' | '.join(pairs)} |", BACKENDS_PAGE)
    (small, extended, wide), times = (row[1:3] for row in table[2:5]), claims("docs/method.md")
    assert f"{extended[1]} µs instead of {small[1]} at 8,192 tokens" in times and f"as exact at {wide[1]}" in times


def test_gpu_checks():
    checks = {row["check"]: row for row in read_rows(RESULTS / GPU / "checks.jsonl")}
    failed, passed, skipped = re.match(
        r"(\d+) failed, (\d+) passed, (\d+) skipped", checks["GPU tests"]["last"]
    ).groups()
    said(f"{passed} passed, {skipped} skipped, {failed} failed", BACKENDS_PAGE)
    said("`memcheck` finds nothing in the `cuda` and the `triton` backend", BACKENDS_PAGE)
    sanitized = {name: row["status"] for name, row in checks.items() if "check," in name}
    assert sanitized == {"memcheck, cuda": "passed", "memcheck, triton": "passed"}
    said("`initcheck` and `synccheck` have not run", BACKENDS_PAGE)


@pytest.mark.parametrize("form", ["factored", "tiled"])
def test_gpu_table(form):
    rows = {row["provider"]: row for row in layers(GPU) if row["tokens"] == 8192 and row["form"] == form}
    titles = {"the official way": "official"} | {f"`{name}`": f"genft-{name}" for name in BACKENDS}
    if form == "factored":
        titles |= {"frozen `nn.Linear`": "frozen", "PEFT LoRA, rank 26": "peft-lora"}
    for title, provider in titles.items():
        given = rows.get(f"{provider}-token-side")
        times = [f"{row['time_ms']['both'][1]:.2f}" if row else "–" for row in (rows[provider], given)]
        gain = rows[provider]["gain"]
        said(f"| {title} | {times[0]} | {times[1]} | {f'{gain[0]:.2f}' if gain else '–'} |", BACKENDS_PAGE)

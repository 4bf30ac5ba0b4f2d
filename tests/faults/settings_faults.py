"""Faults in settings and rates: how units start, s and r for a budget, optimizer groups."""

from tests.faults.planting import Fault

MODULES = ["tests/model/test_modules.py"]
CONFIG = ["tests/method/test_config.py"]
CONFIG_FILE = "genft_kernels/config.py"
ARGUMENTS = "genft_kernels/arguments.py"
BUDGET = ["tests/method/test_budget.py"]
RATES = ["tests/model/test_parameter_groups.py"]

FAULTS = [
    Fault(
        "start by the downs: ups drawn by the number of units",
        "genft_kernels/generator.py",
        "1 / math.sqrt(parameter.shape[0])",
        "1 / math.sqrt(parameter.shape[1])",
        MODULES,
    ),
    Fault(
        "start of a sum: one of its stages is not at zero",
        "genft_kernels/generator.py",
        '"sum": ("column", "row")',
        '"sum": ("row",)',
        MODULES,
    ),
    Fault(
        "start by the downs: the up bias is left as it is drawn",
        "genft_kernels/generator.py",
        '("down", "down_bias", "up_bias")',
        '("down", "down_bias")',
        MODULES,
    ),
    Fault(
        "start by the downs: a layer's own units start at random",
        "genft_kernels/units.py",
        'name.replace("_specific", "")',
        "name",
        MODULES,
    ),
    Fault(
        "start by the ups: kept under its name, which is another configuration",
        "genft_kernels/config.py",
        'True if self.zero_delta == "up" else self.zero_delta',
        "self.zero_delta",
        CONFIG,
    ),
    Fault(
        "budget: what is left over is not spent",
        "genft_kernels/budget.py",
        "(left - r * specific) // shared",
        "config.shared_dim * r // max(1, config.specific_dim)",
        BUDGET,
    ),
    Fault(
        "budget: shared units before one of each layer's own",
        "genft_kernels/budget.py",
        "r = max(r, 1)",
        "pass",
        BUDGET,
    ),
    Fault(
        "budget: pays for own units alone where they never train",
        "genft_kernels/budget.py",
        'config.transform != "both" and ',
        "",
        BUDGET,
    ),
    Fault(
        "budget: every preset in the proportion of fast",
        "genft_kernels/budget.py",
        "r = config.specific_dim * left // (config.specific_dim * specific + config.shared_dim * shared)",
        "r = 7 * left // (7 * specific + 12 * shared)",
        BUDGET,
    ),
    Fault("never trains: biases alone are thought not to", CONFIG_FILE, "== 0 and not self.bias:", "== 0:", CONFIG),
    Fault("never trains: nor what is saved whole", CONFIG_FILE, "scaling=0: no unit", "scaling=0: nothing", CONFIG),
    Fault("never trains: a scale of zero is passed over", CONFIG_FILE, "if self.scaling == 0:", "if False:", CONFIG),
    Fault("warnings: point into dataclasses", ARGUMENTS, '(__package__, "dataclasses")', "(__package__,)", CONFIG),
    Fault("warnings: once for each number of units", ARGUMENTS, "    if _told.get():", "    if False:", BUDGET),
    Fault(
        "budget: biases are not counted",
        "genft_kernels/budget.py",
        "parameters - (smallest - shared)",
        "parameters",
        BUDGET,
    ),
    Fault(
        "rates: a fused weight counts once",
        "genft_kernels/parameter_groups.py",
        "len(module.blocks.adapted)",
        "1",
        RATES,
    ),
    Fault(
        "rates: not its square root",
        "genft_kernels/parameter_groups.py",
        "1 / math.sqrt(generators[generator])",
        "1 / generators[generator]",
        RATES,
    ),
    Fault(
        "rates: shared units that PEFT's tuner holds are taken for layers' own",
        "genft_kernels/parameter_groups.py",
        "[*generator.parameters(), *generator.forward().values()]",
        "[*generator.parameters()]",
        RATES,
    ),
    Fault(
        "rates: heads of a wrapped model are not found",
        "genft_kernels/parameter_groups.py",
        '{f"{path}.{name}".lstrip(".") for name in',
        "{name for name in",
        RATES,
    ),
    Fault(
        "rates: a part of a model without its generator is taken",
        "genft_kernels/parameter_groups.py",
        "id(tensor) not in within:",
        "False:",
        RATES,
    ),
]

"""Faults in how "auto" chooses: the table of what was measured, its trust, backends that fail, and the gate."""

from tests.faults.planting import Fault

CHOICES = "genft_kernels/backends/choices.py"
BACKENDS = "genft_kernels/backends/__init__.py"
OPS = "genft_kernels/ops.py"
TUNING = "genft_kernels/tuning.py"
GATE = "genft_kernels/backends/gate.py"
TESTS = ["tests/backends/test_choices.py"]
OF_CLOCK = ["tests/backends/test_tuning.py"]
OUTCOMES = ["tests/backends/test_gate.py", "-k", "tells_verdicts or compiled_before"]
TESTS_OF_GATE = ["tests/backends/test_gate.py", "-m", "not slow"]

FAULTS = [
    Fault(
        "imports: one within a function that closes a cycle",
        "genft_kernels/backends/card.py",
        "    from .compiled import cache\n",
        "    from . import gate  # noqa: F401\n    from .compiled import cache\n",
        ["tests/packaging/test_rules.py", "-k", "cycle"],
    ),
    Fault("choices: what was measured is not asked", BACKENDS, "if name is not None and may_choose", "if False", TESTS),
    Fault("choices: a table for every length", CHOICES, "return 1 << (tokens - 1).bit_length()", "return 8", TESTS),
    Fault(
        "choices: loaded anew each time",
        CHOICES,
        "known = _tables.setdefault(device, _load(device))",
        "known = _load(device)",
        TESTS,
    ),
    Fault("choices: of whatever card", CHOICES, "for name in same or here", "for name in same", TESTS),
    Fault("choices: any names taken", CHOICES, "<= set(OPERATION_BACKENDS)", "<= {*map(str, found.values())}", TESTS),
    Fault("choices: what others wrote is lost", CHOICES, "{**known, **found}", "{**found}", TESTS),
    Fault("choices: off is no word", CHOICES, 'value == "off"', 'value == "none"', TESTS),
    Fault("choices: every rank its own", CHOICES, "_tables[device] = fitting[0] if fitting else {}", "pass", TESTS),
    Fault("auto: a failure ends the run", OPS, "except (backends.LaunchError, BuildError)", "except BuildError", TESTS),
    Fault(
        "explain: a card without a number",
        BACKENDS,
        "and device.index is None:",
        "and False:",
        ["tests/backends/test_backends.py", "-k", "explain"],
    ),
    Fault("auto: a failure is not remembered", BACKENDS, "_set_aside[name, device] = f", "_ = f", TESTS),
    Fault(
        "tune: draws from the model's random numbers",
        TUNING,
        "torch.random.fork_rng(devices)",
        "torch.no_grad()",
        TESTS,
    ),
    Fault("tune: measures nothing in silence", TUNING, "if wrong or not counts:", "if wrong:", TESTS),
    Fault(
        "tune: times another card",
        TUNING,
        "with torch.cuda.device(device):",
        "with torch.cuda.device(torch.device('cuda', 0)):",
        OF_CLOCK,
    ),
    Fault(
        "tune: takes sequences alone",
        TUNING,
        "if is_integer(tokens) else",
        "if not isinstance(tokens, (list, tuple)) else",
        TESTS,
    ),
    Fault(
        "tune: an array without a length is no error of ours", TUNING, "except TypeError:", "except KeyError:", TESTS
    ),
    Fault("tune: its seconds have an end", TUNING, "if seconds != math.inf and not", "if not", TESTS),
    Fault("tune: compiles in its seconds", TUNING, "in _calls(update, 1).values()", "in ()", OF_CLOCK),
    Fault(
        "tune: has gates run in its seconds",
        TUNING,
        "                _names(update.stored_weight.device, of_shape)  # has gates run\n",
        "                pass\n",
        OF_CLOCK,
    ),
    Fault("tune: keeps the slowest", TUNING, "min(self.milliseconds", "max(self.milliseconds", TESTS),
    Fault("gate: a hang is tried for ever", GATE, "if tries == TRIES:", "if False:", TESTS_OF_GATE),
    Fault("gate: for each process anew", GATE, 'if "rejected" in known:', "if False:", TESTS_OF_GATE),
    Fault("gate: NaN is small enough", GATE, "if not error <= allowed:", "if error > allowed:", TESTS_OF_GATE),
    Fault("gate: races unseen", GATE, "if not all(torch.equal(found, other)", "if any(False", TESTS_OF_GATE),
    Fault("gate: masks not compared", GATE, "if case.dropout and case.row and", "if False and", TESTS_OF_GATE),
    Fault("gate: compiles one case after the other", GATE, "Executor(len(cases),", "Executor(1,", TESTS_OF_GATE),
    Fault(
        "gate: compiles on another card",
        GATE,
        "initializer=torch.cuda.set_device, initargs=(device,)",
        "initializer=None",
        TESTS_OF_GATE,
    ),
    Fault("gate: what a thread raises is lost", GATE, "for _ in threads.map(", "if threads.map(", TESTS_OF_GATE),
    Fault(
        "gate: compiles as it goes",
        GATE,
        'if device.type == "cuda":\n        _comp',
        "if False:\n        _comp",
        TESTS_OF_GATE,
    ),
    Fault("gate: a card without room is kept", GATE, "if outcome is Outcome.NOTHING:", "if False:", TESTS_OF_GATE),
    Fault(
        "gate: a card without room for cuBLAS is kept",
        BACKENDS,
        '("out of memory", "ALLOC_FAILED")',
        '("out of memory",)',
        OUTCOMES,
    ),
    Fault(
        "gate: a compilation that fails is tried by every process",
        GATE,
        "return str(error), Outcome.FAILURE",
        "return str(error), Outcome.NOTHING",
        OUTCOMES,
    ),
    Fault(
        "auto: a backend set aside for a card without room",
        OPS,
        "if isinstance(error, backends.LaunchError) and",
        "if False and",
        TESTS,
    ),
    Fault("gate: a process that was stopped counts", GATE, " or done.returncode in _STOPPED", "", TESTS_OF_GATE),
    Fault("gate: a death counts as the machine's", GATE, "sys.exit(_FAILED)", "sys.exit(1)", TESTS_OF_GATE),
    Fault("gate: nvcc runs in its time", GATE, 'if backend == "cuda":', "if False:", TESTS_OF_GATE),
    Fault("gate: memory that a card may lack", GATE, "[0] > 2 * _bytes", "[0] > 0 * _bytes", TESTS_OF_GATE),
]

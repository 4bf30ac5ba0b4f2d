"""Measurements on a device: how "auto" chooses by it, and how it is kept; and backends whose kernels fail."""

import functools
import json
import math
import os
import sys
import threading
import types
import warnings

import numpy as np
import pytest
import torch

from genft_kernels import GenFTConfig, GenFTLinear, __main__, _torch_private, apply_genft, backends, tune, tuning
from genft_kernels.backends import card, choices
from genft_kernels.functional import genft_linear
from tests.helpers.cases import CPU, case_of, make_data, run
from tests.helpers.processes import in_two_processes

NAME = "cuda"  # stands for another backend; here its operations are eager's
CONFIG = GenFTConfig(shared_dim=3, specific_dim=1, dropout=0.2, zero_delta=False, target_modules=["0", "1"])


@pytest.fixture
def another(monkeypatch, tmp_path):
    """A second backend that "auto" may take on this CPU, and what it was asked for; an empty cache folder."""
    train()  # compiles what a CPU needs, in the folder that the user has
    calls = []

    class Another:
        def __getattr__(self, operation):
            calls.append(operation)
            return getattr(backends.load("eager"), operation)

    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: Another() if name == NAME else load(name))
    monkeypatch.setattr(backends, "_refusal", lambda name, *_: backends._set_aside.get((name, CPU)) and "set aside")
    monkeypatch.setattr(backends, "KERNEL_BACKENDS", (NAME,))
    for module in (backends, choices):
        monkeypatch.setattr(module, "OPERATION_BACKENDS", ("eager", NAME))
    monkeypatch.setattr(backends, "_set_aside", {})
    monkeypatch.setattr(choices, "_tables", {})
    monkeypatch.setattr(tuning, "_COLD_BYTES", (1, 1))
    monkeypatch.setenv("GENFT_CACHE_DIR", str(tmp_path))
    backends.default_for.cache_clear()
    return calls


def table_of(*shapes):
    return {str(choices.Shape(*shape)): NAME for shape in shapes}


TILED = (True, torch.float32, 12, 20, 4)  # of the layer below
EVERYTHING = table_of((*TILED, 0, False), (*TILED, 0, True), (*TILED, 8, False), (*TILED, 8, True))


def train(tokens=7):
    torch.manual_seed(0)
    layer = GenFTLinear(12, 20, config=CONFIG)
    layer(torch.randn(tokens, 12, requires_grad=True)).sum().backward()
    return [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]


def test_auto_takes_what_was_measured_for_the_shape(another):
    choices.save(CPU, EVERYTHING)
    grads = train()
    assert another == ["column", "row", "linear", "linear_backward", "row_backward", "column_backward"]
    del another[:]
    train(tokens=9)  # sixteen, which nobody measured
    assert another == ["column", "row", "row_backward", "column_backward"]
    choices._tables.clear()
    choices._tables[CPU] = {}
    assert all(torch.equal(one, other) for one, other in zip(grads, train(), strict=True))


def test_table_is_loaded_once(another):
    train()
    choices.save(CPU, EVERYTHING)
    train()
    assert not another and choices.table(CPU) == {}
    choices._tables.clear()  # another process
    assert choices.table(CPU) == EVERYTHING


def test_variable_pins_a_file_or_turns_choices_off(another, monkeypatch, tmp_path):
    file = choices.save(CPU, EVERYTHING)
    monkeypatch.setenv(choices.VARIABLE, "off")
    assert choices.table(CPU) == {}
    pinned = tmp_path / "pinned.json"
    content = json.loads(file.read_text())
    content["made_for"]["torch"] = content["made_for"]["sources"] = "of another day"
    pinned.write_text(json.dumps(content))
    file.unlink()
    choices._tables.clear()
    monkeypatch.setenv(choices.VARIABLE, str(pinned))
    assert choices.table(CPU) == EVERYTHING
    choices._tables.clear()
    monkeypatch.setenv(choices.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="GENFT_CHOICES must be off or the path of a file that tune wrote; got "):
        choices.table(CPU)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda content: "{", "Expecting property name"),
        (lambda content: "[3]", "no JSON object"),
        (lambda content: json.dumps(content | {"made_for": content["made_for"] | {"driver": "1.0"}}), "not made for"),
        (lambda content: json.dumps(content | {"choices": {"a": "no backend"}}), "not names of backends"),
        (lambda content: json.dumps(content | {"choices": [["eager"]]}), "not names of backends"),
    ],
)
def test_damaged_or_foreign_file_is_ignored_with_one_warning(damage, words, another):
    file = choices.save(CPU, EVERYTHING)
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.warns(RuntimeWarning, match=f"the choices in .* are not used: .*{words}") as caught:
        assert choices.table(CPU) == choices.table(CPU) == {}
    assert len(caught) == 1


def test_two_writers_lose_nothing(another):
    shapes = [(*TILED, 2**n, False) for n in range(12)]
    threads = [threading.Thread(target=choices.save, args=(CPU, table_of(shape))) for shape in shapes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert choices.table(CPU) == table_of(*shapes)


def test_compiled_graph_chooses_anew_for_each_length(another):
    choices.save(CPU, table_of((*TILED, 8, False)))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    layer = GenFTLinear(12, 20, config=CONFIG)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    taken = []
    for tokens in (5, 7, 13, 100):
        compiled(torch.randn(tokens, 12))
        taken.append(another.count("linear"))
        del another[:]
    assert taken == [1, 1, 0, 0] and len(graphs) == 1


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def become(another, monkeypatch):
    """Make this process, with nothing loaded, a rank of a group of two."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(_torch_private, "store_of_process_group", lambda: store)

    def become(rank):
        group = dict(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
        monkeypatch.setattr(choices, "distributed", types.SimpleNamespace(**group, get_rank=lambda: rank))
        choices._tables.clear()

    return become


def test_every_rank_chooses_as_rank_0_does(become):
    file = choices.save(CPU, EVERYTHING)
    become(0)
    apply_genft(torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Linear(20, 20)), CONFIG)
    file.unlink()  # what the other rank finds for itself
    become(1)
    apply_genft(torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Linear(20, 20)), CONFIG)
    assert choices.table(CPU) == EVERYTHING


def table_of_rank(folder, rank):
    """The choice of a rank, of which rank 0 alone has a table on its disk."""
    os.environ["GENFT_CACHE_DIR"] = f"{folder}/{rank}"
    os.mkdir(f"{folder}/{rank}")
    if rank == 0:
        choices.save(CPU, EVERYTHING)
    apply_genft(torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Linear(20, 20)), CONFIG)
    return dict(choices.table(CPU))


def test_ranks_of_a_process_group_choose_by_one_table(tmp_path):
    assert in_two_processes(tmp_path, functools.partial(table_of_rank, str(tmp_path))) == [(EVERYTHING, EVERYTHING)]


def test_rank_on_another_card_chooses_by_counting(become, monkeypatch):
    choices.save(CPU, EVERYTHING)
    become(0)
    choices.agree()
    become(1)
    here = card.identity(CPU)
    monkeypatch.setattr(card, "identity", lambda device: here | {"card": "another"})
    with pytest.warns(RuntimeWarning, match="no measured choices for cpu: rank 0 has another card or other v"):
        choices.agree()
    assert choices.table(CPU) == {}


def test_rank_that_alone_has_measured_chooses_by_counting(become):
    become(0)
    choices.agree()
    choices.save(CPU, EVERYTHING)
    become(1)
    with pytest.warns(RuntimeWarning, match="rank 1 uses no measured choices for cpu: rank 0 has none"):
        choices.agree()
    assert choices.table(CPU) == {}


def test_rank_0_that_never_comes_is_an_error(become, monkeypatch):
    monkeypatch.setattr(choices, "_PATIENCE", 0.01)
    become(1)
    with pytest.raises(RuntimeError, match="[Tt]imeout"):
        choices.agree()


# --- backends that fail -----------------------------------------------------------------------------------------------


def failing(operation, reason="no such driver"):
    def fails(*args):
        raise backends.LaunchError(f"Triton kernel 'contract' failed to launch: {reason}")

    return type("Failing", (), {operation: staticmethod(fails)} | {
        name: staticmethod(getattr(backends.load("eager"), name))
        for name in ("column", "column_backward", "row", "row_backward", "linear", "linear_backward")
        if name != operation
    })  # fmt: skip


@pytest.mark.parametrize("operation", ["column", "linear_backward"])
def test_auto_goes_on_without_a_backend_that_fails(operation, another, monkeypatch):
    expected, load = train(), backends.load
    broken = failing(operation)
    monkeypatch.setattr(backends, "load", lambda name: broken if name == NAME else load(name))
    choices._tables[CPU] = EVERYTHING
    with pytest.warns(RuntimeWarning) as caught:
        found = train()
        train()
    (warning,) = caught
    assert all(word in str(warning.message) for word in ("'cuda'", "cpu", operation, "'contract'", "no such driver"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_auto_sets_no_backend_aside_for_a_card_without_room(another, monkeypatch):
    load, broken = backends.load, failing("column", "out of memory (error 2)")
    monkeypatch.setattr(backends, "load", lambda name: broken if name == NAME else load(name))
    choices._tables[CPU] = EVERYTHING
    with pytest.raises(backends.LaunchError, match="out of memory"):
        train()
    assert not backends._set_aside


def test_backend_by_name_raises_what_fails(another, monkeypatch):
    load, broken = backends.load, failing("row")
    monkeypatch.setattr(backends, "load", lambda name: broken if name == NAME else load(name))
    monkeypatch.setattr(backends, "unavailable", lambda name, device, dtype: None)
    case = case_of("dropout-square")
    with pytest.raises(backends.LaunchError, match="no such driver"), warnings.catch_warnings(action="error"):
        run(genft_linear, make_data(case, torch.float32), case.config, backend=NAME, training=True, seed=1)


def test_set_aside_is_explained(monkeypatch):
    monkeypatch.setattr(backends, "_set_aside", {})
    monkeypatch.setattr(backends, "unavailable", lambda name, device, dtype: None)
    with pytest.warns(RuntimeWarning, match="goes on without 'triton'"):
        backends.set_aside("triton", CPU, "row", RuntimeError("it broke"))
    assert "triton: available by name; rejected for auto: set aside in this process: row: it broke" in backends.explain(
        "cpu"
    )


def test_triton_launch_that_fails_names_its_kernel():
    pytest.importorskip("triton")
    from genft_kernels.backends.triton.launch import named

    def contract():
        raise OSError("out of resource: shared memory")

    with pytest.raises(backends.LaunchError, match="Triton kernel 'contract' failed to launch: OSError: out of res"):
        named(contract)()

    def fold():
        raise reason

    for reason in (torch.OutOfMemoryError("no memory"), RuntimeError("Triton Error [CUDA]: out of memory")):
        with pytest.raises(type(reason), match=r"^(no memory|Triton Error \[CUDA\]: out of memory)$"):
            named(fold)()


# --- tune -------------------------------------------------------------------------------------------------------------


def test_tune_keeps_the_fastest_of_every_shape(another, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "SECONDS_A_SHAPE", 0.0)
    times = iter(range(10**6, 0, -1))  # whoever is later is faster
    monkeypatch.setattr(tuning, "_milliseconds", lambda device, name, calls: next(times))
    model = apply_genft(torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Linear(20, 20)), CONFIG)
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    measured = tune(model, [7, 8, 30])
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    shapes = {each.shape for each in measured}
    assert set(EVERYTHING) <= shapes and str(choices.Shape(*TILED, 32, True)) in shapes
    assert str(choices.Shape(False, *TILED[1:], 8, False)) in shapes  # as it evaluates
    assert all(list(each.milliseconds) == ["eager", NAME] and each.fastest == NAME for each in measured)
    assert choices.table(CPU) == {shape: NAME for shape in shapes}
    printed = capsys.readouterr().out
    assert all(shape in printed for shape in shapes) and "kept in" in printed
    train()
    assert "linear_backward" in another


def test_tune_takes_whatever_yields_numbers(another):
    layer = GenFTLinear(12, 20, config=CONFIG)
    for tokens in (np.int64(8), [np.int64(8)], np.array([8]), {8}, iter([8]), range(8, 9)):
        assert tune(layer, tokens, seconds=np.float32(0)) == []


def test_tune_may_take_all_the_time_it_needs(another, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS_A_SHAPE", 0.0)
    assert tune(GenFTLinear(12, 20, config=CONFIG), 8, seconds=math.inf)


def test_tune_stops_when_its_time_is_over(another, capsys):
    layer = GenFTLinear(12, 20, config=CONFIG)
    assert tune(layer, 8, seconds=0.0) == [] and not list(card.file("choices", CPU).parent.glob("choices-*"))
    assert "not measured, 0 s are over" in capsys.readouterr().out


def test_tune_says_what_is_wrong(another):
    with pytest.raises(ValueError, match='no GenFT layers with backend="auto"'):
        tune(torch.nn.Linear(3, 3))
    layer = GenFTLinear(12, 20, config=CONFIG)
    tokens = {"8": "'8'", 8.0: "8.0", None: "None", True: "True", (): r"\(\)", (8, 0): "0"}
    for wrong, named in {**tokens, torch.tensor(8): r"tensor\(8\)"}.items():  # which cannot be iterated over
        with pytest.raises(ValueError, match=f"tokens must be positive integers, one or more, got {named}$"):
            tune(layer, wrong)
    for wrong in ("1", None, -1, -math.inf, math.nan):
        with pytest.raises(ValueError, match="seconds must be a number of at least 0, got "):
            tune(layer, 8, seconds=wrong)
    with pytest.raises(TypeError, match="model must be a Module"):
        tune("model")


def test_command_measures_a_layer(another, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "SECONDS_A_SHAPE", 0.0)
    command = "genft_kernels tune --shape 32x40 --tokens 8 --dtype float32"
    monkeypatch.setattr(sys, "argv", command.split())
    __main__.main()
    assert str(choices.Shape(False, torch.float32, 32, 40, 19, 8, True)) in capsys.readouterr().out
    assert choices.table(CPU)


def test_command_tries_the_kernels_only(another, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["genft_kernels", "tune", "--gate-only"])
    __main__.main()
    assert capsys.readouterr().out == "no card for the kernels to be tried on\n" and choices.table(CPU) == {}

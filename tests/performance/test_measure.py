"""Costs from running the programs of layers; what the clock says is given, where it matters."""

import itertools
import threading
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxptis.cluster import DEVICE_SPECS
from jaxptis.performance import LayerCost
from jaxptis.performance import calibrate as calibrating
from jaxptis.performance import measure as measuring
from jaxptis.performance.calibrate import calibrate
from jaxptis.performance.estimate import estimate
from jaxptis.performance.measure import measure
from passes import jaxprs
from passes.layer_programs import layer_programs
from passes.stages import Operand, Role
from tests.passes.on_host import layers_of
from tests.passes.small_models import MODELS, array, case
from tests.small_models import loss_fn, make_batch, make_params

SECONDS = ("forward_s", "backward_s", "input_grad_s", "weight_grad_s", "recompute_s")


@pytest.fixture
def quick(monkeypatch):
    """No program is run more often than it must be."""
    monkeypatch.setattr(measuring, "ENOUGH_S", 0.0)


def small(num_blocks=2):
    return layer_programs(layers_of(loss_fn, make_params(num_blocks), make_batch()))


def test_all_but_the_seconds_are_those_of_an_estimate(quick):
    layers = small()
    device = jax.devices()[3]
    measured = measure(layers, device, state_bytes={0: 12})
    estimated = estimate(layers, DEVICE_SPECS["cpu"], state_bytes={0: 12})
    same = [each.name for each in fields(LayerCost) if each.name.endswith("_bytes")]
    for ours, theirs in zip(measured.layers, estimated.layers, strict=True):
        assert {n: getattr(ours, n) for n in same} == {n: getattr(theirs, n) for n in same}
        assert ours.backward_temporary_bytes > 0
    assert measured.tied == estimated.tied
    assert (measured.source, measured.device) == ("measured", "cpu")
    assert measured.start_s > 0
    _, block, *_ = measured.layers
    assert block.forward_s > 0 and block.backward_s > 0
    first, *_ = measured.layers
    assert first.input_grad_s == first.recompute_s == 0  # it has no such program


def test_medians_less_what_it_takes_to_start(monkeypatch):
    """Every program's runs take 7, 1, 2, 9, 4 seconds more than the program's place."""

    def seconds(programs):
        return [[k + s for s in (7.0, 1.0, 2.0, 9.0, 4.0)] for k in range(len(programs))]

    monkeypatch.setattr(measuring, "_seconds", seconds)
    costs = measure(small(num_blocks=1), jax.devices()[0])
    assert costs.start_s == 4
    # Forwards come first, then what is run again, B, I and W, each from the last layer to the
    # first, which has F, B and W only.
    first, block, head = costs.layers
    assert [getattr(first, name) for name in SECONDS] == [1, 8, 0, 13, 0]
    assert [getattr(block, name) for name in SECONDS] == [2, 7, 10, 12, 5]
    assert [getattr(head, name) for name in SECONDS] == [3, 6, 9, 11, 4]
    # The quartiles are 2 and 7 seconds; the program of the smallest median has the largest spread.
    assert first.spread == 5 / (4 + 1)
    assert head.spread == 5 / (4 + 3)


def test_a_program_faster_than_an_empty_one_takes_nothing(monkeypatch):
    def seconds(programs):
        return [[100.0 - k] * 2 for k in range(len(programs))]

    monkeypatch.setattr(measuring, "_seconds", seconds)
    costs = measure(small(num_blocks=0), jax.devices()[0])
    assert {getattr(layer, name) for layer in costs.layers for name in SECONDS} == {0}


@pytest.mark.parametrize(("round_s", "num_rounds"), [(2.0, 9), (0.5, 9), (0.0402, 15), (0.0, 99)])
def test_short_programs_run_more_often(monkeypatch, round_s, num_rounds):
    """At least 9 times, more as long as all took less than 0.3 s each, and 99 times at most."""
    now_s, order = 0.0, []

    def program(name, run_s):
        def run():
            nonlocal now_s
            now_s += run_s
            order.append(name)

        return run

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now_s)
    runs_s = measuring._seconds([program("a", round_s / 4), program("b", 3 * round_s / 4)])
    assert order == ["a", "b"] * num_rounds
    np.testing.assert_allclose(runs_s, [[round_s / 4] * num_rounds, [3 * round_s / 4] * num_rounds])


@pytest.fixture
def results(monkeypatch):
    """A list that grows by what each program returns, run once each."""
    found = []

    def seconds(programs):
        for run in programs:
            found.append(
                [np.asarray(x) for x in run() if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
            )
        return [[1.0, 1.0] for _ in programs]

    monkeypatch.setattr(measuring, "_seconds", seconds)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_programs_are_given_what_they_can_work_with(name, results):
    """A token that is not in the vocabulary gives NaN, as would saved values that are drawn."""
    layers = layer_programs(case(name).graph)
    measure(layers, jax.devices()[0])
    kinds = {layer.kind.index: layer.kind for layer in layers}.values()
    assert len(results) == 1 + sum(len(kind.programs) for kind in kinds)
    for arrays in results:
        assert all(np.isfinite(x.astype(np.float32)).all() for x in arrays)


def test_tokens_are_of_the_whole_vocabulary():
    params = {"embedding": array(1000, 8), "head": array(8, 8)}

    def loss(p, ids):
        return (p["embedding"][ids] @ p["head"]).sum()

    ids = jnp.zeros((2, 500), jnp.int32)
    kind = layer_programs(layers_of(loss, params, ids))[0].kind
    (drawn,) = (
        measuring._value(operand, v.aval, kind)
        for operand, v in zip(
            kind.gradient.forward.reads, kind.gradient.forward.jaxpr.invars, strict=True
        )
        if operand.role == Role.BATCH
    )
    assert drawn.dtype == np.int32 and drawn.min() >= 0 and 900 < drawn.max() < 1000


def test_sums_of_gradients_are_consumed_and_grow():
    kind = small(num_blocks=1)[1].kind
    program = kind.gradient.backward
    values = {
        operand: jnp.asarray(measuring._value(operand, v.aval, kind))
        for operand, v in zip(program.reads, program.jaxpr.invars, strict=True)
    }
    sums = {operand: x for operand, x in values.items() if operand.role == Role.SUM}
    once = dict(
        zip(
            program.writes,
            jaxprs.evaluate(program.jaxpr, [values[x] for x in program.reads]),
            strict=True,
        )
    )
    assert len(sums) == 2 and not any(x.any() for x in sums.values())
    compiled = measuring._compile(program, jax.devices()[0])
    running = measuring._Running(kind.index, "B", program, compiled)
    running.arguments.append(values)
    for _ in range(3):
        running()
    for operand, x in sums.items():
        assert x.is_deleted()
        np.testing.assert_allclose(values[operand], 3 * once[operand], rtol=1e-5)


def test_keys_of_random_numbers():
    def loss(p, batch):
        x = jnp.tanh(batch["x"] @ p["first"])
        x = jnp.where(jax.random.bernoulli(batch["key"], 0.5, x.shape), x, 0)
        return (x @ p["head"]).sum()

    batch = {"x": array(4, 8), "key": jax.random.key(0)}
    key = Operand(Role.BATCH, 0)
    layers = layer_programs(layers_of(loss, {"first": array(8, 8), "head": array(8, 2)}, batch))
    (kind,) = (layer.kind for layer in layers if key in layer.kind.gradient.forward.reads)
    position = kind.gradient.forward.reads.index(key)
    drawn = measuring._value(key, kind.gradient.forward.jaxpr.invars[position].aval, kind)
    assert drawn.dtype == batch["key"].dtype and drawn.shape == ()


def test_layers_of_one_kind_are_compiled_and_run_once(compilations, quick):
    measure(small(num_blocks=4), jax.devices()[0])
    assert (
        len(compilations) == 1 + 3 + 5 + 5
    )  # the empty program, the first layer, a block, the head


def test_nothing_runs_before_all_is_compiled(monkeypatch):
    """But what is shown goes on: the last to be compiled waits for it."""
    layers = small(num_blocks=1)
    programs = [program for layer in layers for program in layer.kind.programs.values()]
    compile_program, run_on = measuring._compile, measuring._Running.run_on
    events, is_shown = [], threading.Event()

    def compiling(program, device):
        assert program is not programs[-1] or is_shown.wait(timeout=60)
        compiled = compile_program(program, device)
        events.append("compiled")
        return compiled

    def running(self, arguments):
        events.append("run")
        return run_on(self, arguments)

    def track(items):
        for item in items:
            yield item
            is_shown.set()

    monkeypatch.setattr(measuring, "_compile", compiling)
    monkeypatch.setattr(measuring._Running, "run_on", running)
    measuring._prepare(layers, {}, jax.devices()[0], track)
    assert events == ["compiled"] * len(programs) + ["run"] * len(programs)


@pytest.mark.parametrize(("caches_bytes", "count"), [(2**40, 4), (1, 1)])
def test_as_many_layers_of_a_kind_as_caches_may_not_hold(monkeypatch, caches_bytes, count):
    """Of four blocks; forwards begin with the first, all others with the one after it."""
    monkeypatch.setattr(measuring, "CACHES_BYTES", caches_bytes)
    programs = measuring._prepare(small(num_blocks=4), {}, jax.devices()[0], iter)
    monkeypatch.setattr(measuring._Running, "run_on", lambda _, arguments: id(arguments))
    for each in (each for each in programs if each.kind == 1):
        ids = [id(arguments) for arguments in each.arguments]
        assert len(ids) == count
        first = each.name != "F"
        assert [each() for _ in range(6)] == [ids[(first + k) % count] for k in range(6)]


def test_layers_read_what_they_do_in_a_step():
    """Then the last of them returns the loss, and each has parameters of its own."""
    params, batch = make_params(3), make_batch()
    layers = layer_programs(layers_of(loss_fn, params, batch))
    values = {
        Operand(role, index): x
        for role, tree in ((Role.PARAM, params), (Role.BATCH, batch))
        for index, x in enumerate(jax.tree.leaves(tree))
    }
    programs = measuring._prepare(layers, values, jax.devices()[0], iter)
    forwards = {each.kind: each for each in programs if each.name == "F"}
    (last,) = forwards[4].arguments
    loss = last[Operand(Role.RESULT)]
    np.testing.assert_allclose(loss, loss_fn(params, batch), rtol=1e-6)
    for arguments, layer in zip(forwards[1].arguments, layers[1:4], strict=True):
        for operand in (Operand(Role.PARAM, p) for p in layers[1].params):
            assert np.array_equal(arguments[operand], values[layer.operands[operand]])


def test_a_device_of_another_process(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda **_: jax.devices()[:1])
    with pytest.raises(ValueError, match="belongs to another process; measure on a device of this"):
        measure(small(), jax.devices()[1])


def test_rates_are_work_over_time(monkeypatch):
    """Each run takes half a second: the first width of a matmul is wide enough."""
    ticks = itertools.count()
    monkeypatch.setattr(calibrating.time, "perf_counter", lambda: next(ticks) / 2)
    monkeypatch.setattr(calibrating, "_ARRAY_BYTES", 2**20)
    spec = calibrate(jax.devices()[0], jnp.float32)
    assert spec.flops_per_s == 2 * 512**3 / 0.5
    assert spec.bytes_per_s == 2 * 2**20 / 0.5
    assert (spec.kind, spec.memory_bytes, spec.speed) == ("cpu", None, 1.0)


def test_wider_matmuls_are_run_until_one_takes_long_enough(monkeypatch):
    """They take 1, 4 and 16 ms: the third is the last, and the best."""
    seconds, results = iter([0.001, 0.004, 0.016, 1.0, 0.25]), []

    def best_s(run):
        results.append(run())
        return next(seconds)

    monkeypatch.setattr(calibrating, "_best_s", best_s)
    monkeypatch.setattr(calibrating, "_ARRAY_BYTES", 2**20)
    spec = calibrate(jax.devices()[0])
    assert spec.flops_per_s == 2 * 2048**3 / 0.016
    assert spec.bytes_per_s == 2 * 2**20
    assert spec.start_s == 0.25
    assert len(results[-1]) > 1  # a program of many arrays is started, as those of layers are

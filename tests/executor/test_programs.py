"""What is compiled for a step, looked at from outside: matmuls, transfers, memory, counts."""

import collections
import functools
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxptis
from experiments.compilations import counted_compilations
from jaxptis.executor.initializer import initializer
from jaxptis.executor.instructions import Run
from jaxptis.plan import Plan, StagePlan
from jaxptis.schedules import schedule
from passes.boxes import whole
from tests import small_models
from tests.small_models import matrix, normal

# Every layer has widths of its own, so that a matmul says whose it is.
WIDTHS = (3, 5, 7, 11, 13)
NUM_MICROBATCHES, MICROBATCH = 6, 4
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
}
MOVES_DATA = re.compile(r"all-|collective|reduce-scatter|ragged|send|recv|copy-start|host|infeed")

pytestmark = pytest.mark.usefixtures("lenient")


def make_params():
    layers = enumerate(pairwise(WIDTHS))
    return [
        {"kernel": matrix(i, n, m), "bias": normal(9, m), "unsplit": normal(i, 2)}
        for i, (n, m) in layers
    ]


def make_batch(seed=50):
    size = NUM_MICROBATCHES * MICROBATCH
    return {"x": normal(seed, size, WIDTHS[0]), "y": normal(seed + 1, size, WIDTHS[-1])}


def loss_fn(params, batch):
    """Use one scalar of the first layer in the last too, so that a parameter is shared."""
    x = batch["x"]
    for p in params:
        x = jnp.tanh(x @ p["kernel"] + p["bias"] + p["unsplit"][0])
    return jnp.mean((params[0]["unsplit"][1] * x - batch["y"]) ** 2)


@functools.cache
def make_pipelined(strategy):
    return jaxptis.pipeline(
        loss_fn,
        num_microbatches=NUM_MICROBATCHES,
        devices=jax.devices()[:4],
        strategy=strategy,
    )


def bind(strategy="1f1b"):
    """Return what is compiled for the arguments of this file."""
    return make_pipelined(strategy).bind(None, make_params(), make_batch()).compiled


def executables(name="adamw"):
    """Return the training step, the gradient and the evaluation."""
    compiled = bind()
    training = compiled.train_step(OPTIMIZERS[name]).executable
    return training, compiled.gradient_step.executable, compiled.evaluation


def instructions_of(hlo):
    """Yield name, type, opcode and the rest of each instruction in HLO text."""
    pattern = r"^\s*(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$"
    for match in re.finditer(pattern, hlo, re.MULTILINE):
        yield match.groups()


def opcodes(hlo):
    found = [opcode for _, _, opcode, _ in instructions_of(hlo)]
    assert found or "ENTRY" in hlo
    return found


def matmuls(hlo):
    """Count the matmuls in HLO text by their three sizes, sorted."""
    shapes = {
        name: tuple(map(int, re.findall(r"\d+", shape.split("[")[1].split("]")[0])))
        for name, shape, _, _ in instructions_of(hlo)
        if not shape.startswith("(")
    }
    counts = collections.Counter()
    for name, _, opcode, rest in instructions_of(hlo):
        if opcode == "dot":
            left = re.search(r"%?([\w.-]+)[,)]", rest)[1]
            contracted = int(re.search(r"lhs_contracting_dims=\{(\d+)\}", rest)[1])
            counts[tuple(sorted([*shapes[name], shapes[left][contracted]]))] += 1
    return counts


def sizes(layer):
    """Return the sizes of all the matmuls of a layer: forward and both gradients."""
    return tuple(sorted([MICROBATCH, WIDTHS[layer], WIDTHS[layer + 1]]))


@pytest.mark.parametrize("strategy", ["1f1b", "gpipe"])
def test_a_stage_has_its_matmuls_and_no_others(strategy):
    stages = bind(strategy).stages()
    assert [stage.layers for stage in stages] == [("0",), ("1",), ("2",), ("3",)]
    for i, stage in enumerate(stages):
        assert stage.device == i
        assert matmuls(stage.forward.as_text("hlo")) == {sizes(i): 1}
        # The gradients of weights and of inputs; nobody needs that of the batch.
        assert matmuls(stage.backward.as_text("hlo")) == {sizes(i): 2 if i else 1}


def test_forms_of_a_stage():
    executables()
    for stage in make_pipelined("1f1b").stages:
        for program in stage.forward, stage.backward:
            assert "dot_general" in program.as_text("jaxpr")
            assert "stablehlo.dot_general" in program.as_text("stablehlo")
            assert program.as_text("hlo").startswith("HloModule")
            with pytest.raises(ValueError, match="form 'ptx'; use 'jaxpr', 'stablehlo' or 'hlo'"):
                program.as_text("ptx")
            assert program.memory_analysis().argument_size_in_bytes > 0
            assert program.cost_analysis()["bytes accessed"] > 0
    for i, stage in enumerate(make_pipelined("1f1b").stages):
        flops = 2 * MICROBATCH * WIDTHS[i] * WIDTHS[i + 1]
        assert stage.forward.cost_analysis()["flops"] >= flops
        assert stage.backward.cost_analysis()["flops"] >= (2 if i else 1) * flops


def pairs_of(route):
    """Return the directions, as HLO writes them, of the permutations of a route."""
    there, back = (collections.Counter(avals) for avals in route.sends)
    shared = there & back
    found = {"{0,1},{1,0}": shared, "{0,1}": there - shared, "{1,0}": back - shared}
    return {text for text, avals in found.items() if avals}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_transfers_move_data(optimizer):
    devices = jax.devices()[:4]
    pipelined = make_pipelined("1f1b")
    homes = [[d % 4] for d in range(len(jax.tree.leaves(make_params())))]
    init, _ = initializer(
        pipelined.compiler,
        lambda key: [jax.random.normal(key, (2,))] * len(homes),
        [jax.ShapeDtypeStruct((), jax.random.key(0).dtype)],
        homes,
        given=[(whole(()),)],
        wanted=[(whole((2,)),)] * len(homes),
    )
    kinds = collections.Counter()
    for executable in *executables(optimizer), init:
        for program in executable.programs.values():
            hlo = program.as_text("hlo")
            kinds[program.spec.kind] += 1
            assert not [code for code in opcodes(hlo) if MOVES_DATA.search(code)]
            at = {devices[program.spec.device]}
            shardings = jax.tree.leaves(
                (program.compiled.input_shardings, program.compiled.output_shardings)
            )
            assert shardings and all(s.device_set == at for s in shardings)
        for route, exchange in executable.exchanges.items():
            hlo = exchange.compiled.as_text()
            assert any(code.startswith("collective-permute") for code in opcodes(hlo))
            pairs = set(re.findall(r"source_target_pairs=\{((?:\{\d,\d\},?)+)\}", hlo))
            assert pairs == pairs_of(route)
            for sharding in jax.tree.leaves(exchange.compiled.input_shardings):
                assert list(sharding.mesh.devices) == [devices[d] for d in route.devices]
    assert set(kinds) == {"forward", "backward", "zeros", "results", "finish", "update", "init"}


def test_transfers_go_along_the_pipeline():
    """Activations forwards, cotangents backwards; evaluation has the former only."""
    _, gradient, evaluation = executables()
    neighbours = {(i, i + 1) for i in range(3)}
    assert {route.devices for route in evaluation.exchanges} == neighbours
    assert all(not route.sends[1] for route in evaluation.exchanges)
    assert {route.devices for route in gradient.exchanges} - {(0, 3)} == neighbours
    text = gradient.rows.text()
    assert text.count("send x") == text.count("send d") == 3 * NUM_MICROBATCHES


def test_everything_is_compiled_before_the_first_step():
    """Shapes of its own, so that nothing is compiled before by another test."""
    batch = {k: x[:12] for k, x in make_batch().items()}
    pipelined = jaxptis.pipeline(
        loss_fn, strategy="1f1b", num_microbatches=NUM_MICROBATCHES, devices=jax.devices()[:4]
    )
    step = pipelined.train_step(OPTIMIZERS["clipped"])
    with counted_compilations() as compiled:
        state = step.init(make_params(), batch)
    # The layers' costs are measured on programs of their own, which do not run.
    assert len(compiled) >= pipelined.num_compilations > 0
    before = pipelined.num_compilations
    with counted_compilations() as compiled:
        state, _ = step(state, batch)
        assert compiled == []
        numpy_batch = jax.tree.map(lambda x: jax.device_get(x) * 2, batch)
        state, metrics = step(state, numpy_batch)
        assert compiled == []
    assert pipelined.num_compilations == before
    assert jnp.isfinite(metrics["loss"])


def test_the_gradient_is_compiled_before_it_is_computed():
    params, batch = make_params(), {k: x[:18] for k, x in make_batch().items()}
    pipelined = jaxptis.pipeline(
        loss_fn, strategy="1f1b", num_microbatches=NUM_MICROBATCHES, devices=jax.devices()[:4]
    )
    pipelined.compile(params, batch)
    with counted_compilations() as compiled:
        pipelined.value_and_grad(params, batch)
        pipelined.value_and_grad(params, batch)
    assert compiled == []


def equal_layers_loss(params, batch):
    x = batch["x"]
    for p in params:
        x = jnp.tanh(x @ p)
    return jnp.mean((x - batch["y"]) ** 2)


def test_equal_programs_of_one_device_are_compiled_once():
    """Stages 1 to 4 hold one equal layer each; two devices have two of them each."""
    devices = (0, 0, 1, 0, 1, 1)
    rows = [[], []]
    tasks = schedule("gpipe", num_devices=6, num_microbatches=2)
    for s in range(6):
        rows[devices[s]] += [task for task in tasks[s] if task.kind == "F"]
    for s in reversed(range(6)):
        rows[devices[s]] += [task for task in tasks[s] if task.kind == "B"]
    plan = Plan(
        stages=tuple(StagePlan(layers=(f"{i}",), device=d) for i, d in enumerate(devices)),
        schedule=tuple(map(tuple, rows)),
    )
    pipelined = jaxptis.pipeline(
        equal_layers_loss, num_microbatches=2, devices=jax.devices()[:2], strategy=plan
    )
    params = [matrix(i, 6, 6) for i in range(6)]
    batch = {"x": normal(1, 4, 6), "y": normal(2, 4, 6)}
    gradient = pipelined.bind(None, params, batch).compiled.gradient_step.executable
    for kind in "forward", "backward":
        programs = [gradient.programs[f"stage{s}.{kind}"].compiled for s in range(6)]
        assert programs[1] is programs[3] and programs[2] is programs[4]
        assert len({id(program) for program in programs}) == 4
    distinct = {id(program.compiled) for program in gradient.programs.values()}
    assert pipelined.num_compilations == len(distinct) + len(gradient.exchanges)
    value, grads = pipelined.value_and_grad(params, batch)
    wanted = jax.value_and_grad(equal_layers_loss)(params, batch)
    small_models.assert_close(value, wanted[0], rtol=1e-6)
    small_models.assert_close(grads, wanted[1], rtol=1e-6)


def test_equal_programs_of_two_steps_are_compiled_once():
    """The stages of a gradient are those of a training step; only donations differ."""
    training, gradient, _ = executables()
    for i in range(4):
        for kind in "forward", "backward":
            name = f"stage{i}.{kind}"
            assert training.programs[name].compiled is gradient.programs[name].compiled


def kept_microbatches(executable, device, pattern):
    """Return how many microbatches `device` keeps buffers of at once, at most; none at the end."""
    live, peak = set(), 0
    for each in executable.rows.rows[device]:
        live.update(each.writes)
        kept = {match[1] for name in live if (match := re.fullmatch(pattern, name))}
        peak = max(peak, len(kept))
        live.difference_update(each.frees)
    assert not [name for name in live if re.fullmatch(pattern, name)]
    return peak


KEPT = {
    "gpipe": lambda device: NUM_MICROBATCHES,
    "1f1b": lambda device: min(4 - device, NUM_MICROBATCHES),
}


@pytest.mark.parametrize("strategy", KEPT)
def test_activations_live_as_long_as_the_schedule_needs_them(strategy):
    gradient, evaluation = bind(strategy).gradient_step.executable, bind(strategy).evaluation
    activations = r"(?:x\d+|stage\d+\.saved\d+)\.(\d+)"
    for device in range(4):
        kept = kept_microbatches(gradient, device, activations)
        # What is received may come one microbatch before its turn.
        early = strategy == "1f1b" and device > 0
        assert KEPT[strategy](device) <= kept <= KEPT[strategy](device) + early
        assert kept_microbatches(gradient, device, r"d\d+\.stage\d+\.(\d+)") <= 2
    # Without a backward nothing is kept: what is made is sent and dropped.
    assert kept_microbatches(evaluation, 0, activations) <= 2


def test_what_a_forward_saves_lives_until_its_backward():
    """As above, with a model whose forwards save more than what crosses."""

    pipelined = jaxptis.pipeline(
        small_models.loss_fn, strategy="1f1b", num_microbatches=6, devices=jax.devices()[:3]
    )
    call = pipelined.bind(None, small_models.make_params(2), small_models.make_batch(12))
    gradient = call.compiled.gradient_step.executable
    for device in range(3):
        saved = rf"stage{device}\.saved\d+\.(\d+)"
        assert kept_microbatches(gradient, device, saved) == 3 - device


def donated(program):
    """Return, for each input of a compiled program, whether XLA may overwrite it."""
    return [info.donated for info in jax.tree.leaves(program.lowered.args_info)]


def types(avals):
    return collections.Counter((aval.shape, str(aval.dtype)) for aval in avals)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sums_and_state_are_donated(optimizer):
    training, gradient, _ = executables(optimizer)
    for executable in training, gradient:
        for name, program in executable.programs.items():
            flags = donated(program)
            assert len(flags) == len(program.spec.in_avals)
            if program.spec.kind == "backward":
                # The sums stand last, a sum a parameter of the stage.
                num_sums = 4 if name.startswith("stage3") else 3
                assert all(flags[-num_sums:]), name
                assert "input_output_alias" in program.as_text("hlo")
    # Every new parameter and moment takes the place of one that is gone.
    big = {(WIDTHS[i], WIDTHS[i + 1]) for i in range(4)}
    found = collections.Counter()
    for program in training.programs.values():
        if program.spec.kind == "update":
            taken = [a for a, d in zip(program.spec.in_avals, donated(program), strict=True) if d]
            made = types(a for a in program.spec.out_avals if a.shape in big)
            assert types(a for a in taken if a.shape in big) == made
            found.update(made)
    assert sum(found.values()) == 4 * 3  # kernel, mu and nu of each layer


def test_parameters_of_a_gradient_are_not_donated():
    _, gradient, evaluation = executables()
    for executable in gradient, evaluation:
        for name, program in executable.programs.items():
            if program.spec.kind in ("forward", "backward"):
                (run, *_) = (
                    each
                    for row in executable.rows.rows
                    for each in row
                    if isinstance(each, Run) and each.program == name
                )
                flags = dict(zip(run.reads, donated(program), strict=True))
                lasting = r"param|batch|microbatch|stage\d+\.constant|d_loss"
                assert not [n for n, flag in flags.items() if flag and re.match(lasting, n)]

"""Measures what it costs to split a backward: the CPU time of I plus W over that of B.

python -m experiments.split_cost --json_output=experiments/results/split_cost.json

The programs are those that a pipeline of a small LLaMA-2 runs, with the same inputs donated. Each
repetition runs all of them, so that what else the machine does falls on both sides of a ratio.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

import jaxptis
from experiments.json_output import this_run, write_json
from jaxptis.executor.compiled import CompiledProgram
from jaxptis.plan import StagePlan, Task
from models import next_token_loss
from models.llama2 import Llama2, Llama2Config

HEAD_WIDTH = 64
STAGES = {
    "embed": ("embed",),
    "attention": ("layers_0/attention",),
    "mlp": ("layers_0/mlp",),
    "block": ("layers_1/attention", "layers_1/mlp"),
    "head": ("head",),
}
"""The layers of each stage, so that there is one of each kind, and one of several layers."""

MODEL_WIDTH = flags.DEFINE_integer("model_width", 512, "A multiple of 64.", lower_bound=HEAD_WIDTH)
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8192, "Of the model.", lower_bound=2)
MICROBATCH_SIZE = flags.DEFINE_integer(
    "microbatch_size", 4, "Sequences in a microbatch.", lower_bound=1
)
SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 256, "Tokens predicted in each sequence.", lower_bound=1
)
NUM_REPETITIONS = flags.DEFINE_integer(
    "num_repetitions", 20, "How often every program is timed.", lower_bound=2
)
flags.declare_key_flag("json_output")  # --help lists it

Parts = tuple[CompiledProgram, CompiledProgram, CompiledProgram]  # B, I, W

SETTINGS = (MODEL_WIDTH, VOCAB_SIZE, MICROBATCH_SIZE, SEQUENCE_LENGTH, NUM_REPETITIONS)

flags.register_validator(
    "model_width", lambda width: width % HEAD_WIDTH == 0, "it is no multiple of 64; change it"
)


def main(argv: list[str]) -> None:
    """Measures, prints the ratios, and writes them to --json_output."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    stages = compile_stages()
    ratios = summarize(measure_cpu_time(stages), count_flops(stages))
    report(ratios)
    settings = {flag.name: flag.value for flag in SETTINGS}
    write_json(this_run("split_cost", settings) | {"split_over_whole": ratios})


def compile_stages() -> dict[str, Parts]:
    """Returns the backwards of the stages that have an input gradient, whole and in parts."""
    width = MODEL_WIDTH.value
    model = Llama2(
        Llama2Config(
            vocab_size=VOCAB_SIZE.value,
            model_width=width,
            mlp_width=11 * width // 4,
            num_blocks=2,
            num_heads=width // HEAD_WIDTH,
            num_kv_heads=width // HEAD_WIDTH,
            dtype=jnp.float32,
        )
    )

    apply: Callable[..., Any] = model.apply

    def loss(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return next_token_loss(functools.partial(apply, {"params": params}), batch)

    shape = (2 * MICROBATCH_SIZE.value, SEQUENCE_LENGTH.value + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    pipelined = jaxptis.pipeline(
        loss, num_microbatches=2, devices=jax.devices()[:1], strategy=whole_and_split()
    ).compile(params, {"tokens": tokens})
    return {
        name: (stage.backward, stage.input_grad, stage.weight_grad)
        for name, stage in zip(STAGES, pipelined.stages, strict=True)
        if stage.input_grad is not None
    }


def whole_and_split() -> jaxptis.Plan:
    """Returns a plan with whole backwards in microbatch 0, and split ones in microbatch 1."""
    there = range(len(STAGES))
    row = [Task(stage, "F", microbatch) for microbatch in (0, 1) for stage in there]
    row += [Task(stage, "B", 0) for stage in reversed(there)]
    row += [Task(stage, kind, 1) for stage in reversed(there) for kind in "IW"]
    stages = tuple(StagePlan(layers=layers, device=0) for layers in STAGES.values())
    return jaxptis.Plan(stages=stages, schedule=(tuple(row),))


def measure_cpu_time(stages: Mapping[str, Parts]) -> dict[str, list[float]]:
    """Returns (I + W) / B of every repetition, of each stage and of all together."""
    ratios: dict[str, list[float]] = {name: [] for name in (*stages, "all")}
    for programs in stages.values():
        for program in programs:
            cpu_s(program)  # warms up
    for repetition in range(NUM_REPETITIONS.value):
        total_s = np.zeros(3)
        for name, programs in stages.items():
            part_s = np.zeros(3)
            for part in np.roll(range(3), repetition):
                part_s[part] = cpu_s(programs[part])
            ratios[name].append(split_over_whole(part_s))
            total_s += part_s
        ratios["all"].append(split_over_whole(total_s))
    return ratios


def cpu_s(program: CompiledProgram) -> float:
    """Runs a program once, on arrays of its own, and returns the CPU time of all its threads."""
    args = jax.block_until_ready([make_array(aval).copy() for aval in program.spec.in_avals])
    start_s = time.process_time()
    jax.block_until_ready(program.compiled(*args))
    return time.process_time() - start_s


@functools.cache
def make_array(aval: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns positive floats (whatever they stand for, they give no NaN), or zeros."""
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return jnp.zeros(aval.shape, aval.dtype)
    return jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, aval.shape), aval.dtype)


def count_flops(stages: Mapping[str, Parts]) -> dict[str, float]:
    """Returns (I + W) / B by XLA's count of operations, of each stage and of all together."""
    flops = {
        name: np.array([program.cost_analysis()["flops"] for program in programs])
        for name, programs in stages.items()
    }
    flops["all"] = sum(flops.values(), start=np.zeros(3))
    return {name: split_over_whole(each) for name, each in flops.items()}


def split_over_whole(parts: np.ndarray) -> float:
    """Returns (I + W) / B of what B, I and W take."""
    whole, input_grad, weight_grad = parts.tolist()
    return (input_grad + weight_grad) / whole


def summarize(
    cpu_time: Mapping[str, list[float]], flops: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Returns, of each stage and of all together, the ratios of CPU time and of flops."""
    quartiles = {
        name: statistics.quantiles(each, n=4, method="inclusive") for name, each in cpu_time.items()
    }
    return {
        name: {
            "cpu_time": statistics.median(each),
            "cpu_time_first_quartile": quartiles[name][0],
            "cpu_time_third_quartile": quartiles[name][2],
            "flops": flops[name],
        }
        for name, each in cpu_time.items()
    }


def report(ratios: Mapping[str, Mapping[str, float]]) -> None:
    """Prints a line a stage."""
    table = Table("(I + W) / B of", "CPU time", "quartiles", "flops", box=None)
    for name, ratio in ratios.items():
        spread = f"{ratio['cpu_time_first_quartile']:.2f} {ratio['cpu_time_third_quartile']:.2f}"
        table.add_row(name, f"{ratio['cpu_time']:.2f}", spread, f"{ratio['flops']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of JAX, for one; --verbosity=0 shows the rest
    app.run(main)

"""A training run of four devices, which `tests/test_processes.py` starts in several processes.

python -m experiments.launch --num_processes=4 -- tests.process_program --results_to=FOLDER
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import sys
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import jaxptis
from experiments import distributed
from experiments.random_plan import random_plan
from jaxptis import processes
from jaxptis.compile import analyse
from jaxptis.executor.compiled import Compiler
from jaxptis.executor.measure_links import measure_links
from jaxptis.performance.costs_file import to_json
from jaxptis.plan import Plan, StagePlan
from jaxptis.schedules import schedule
from tests.noted import Noted
from tests.small_models import OUT, WIDTH, block, make_batch, make_params, normal

NUM_DEVICES, NUM_STEPS, NUM_MICROBATCHES = 4, 3, 4
LAYERS = ("embedding", *(f"blocks/{i}" for i in range(6)), "embedding#2")
FIRST, SECOND, LAST = schedule("1f1b", num_devices=3, num_microbatches=NUM_MICROBATCHES)
STRATEGIES = {
    "1f1b": "1f1b",
    "zb-v": "zb-v",
    # Seven stages on four devices; one is recomputed, some backwards are split.
    "random": random_plan(Random(0), layers=LAYERS, num_microbatches=NUM_MICROBATCHES),
    "gap": Plan(  # the third device, and so a process, has no stage
        stages=tuple(
            StagePlan(layers=layers, device=device)
            for layers, device in ((LAYERS[:3], 0), (LAYERS[3:6], 1), (LAYERS[6:], 3))
        ),
        schedule=(FIRST, SECOND, (), LAST),
    ),
}
FAILING = 1  # the process that fails, where one does

RESULTS_TO = flags.DEFINE_string("results_to", None, "Folder for what each process has read.")
STRATEGY = flags.DEFINE_enum("strategy", "1f1b", list(STRATEGIES), "How to train.")
FAILURE = flags.DEFINE_enum(
    "failure", None, ["killed", "raises", "differs", "leaves", "evaluates"], "What goes wrong."
)


def loss_fn(params, batch):
    """The first and the last layer read one embedding; auxiliary is a value for each sample."""
    x = batch["y"] @ params["embedding"]
    for p in params["blocks"]:
        x = block(p, x)
    errors = (x @ params["embedding"].T - batch["y"]) ** 2
    return jnp.mean(errors), {"worst": jnp.max(errors, axis=1)}


def run(devices, strategy, failure=None):
    """Train, evaluate and differentiate; return what this process can read, as text by name."""
    pipelined = jaxptis.pipeline(
        loss_fn,
        num_microbatches=2 if failure == "differs" else NUM_MICROBATCHES,
        devices=devices,
        strategy=STRATEGIES[strategy],
        has_aux=True,
    )
    params = {"embedding": normal(7, OUT, WIDTH), "blocks": make_params(6)["blocks"]}
    step = pipelined.train_step(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)))
    seen = []
    lazy = jax.tree_util.tree_map_with_path(
        lambda path, leaf: Noted(leaf, jax.tree_util.keystr(path), seen), params
    )
    state = step.init(lazy, make_batch())
    read = {f"initial{name}": str(seen.count(name)) for name in seen}
    for i in range(NUM_STEPS):
        if failure == "killed" and i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if failure == "raises" and i == 1:
            raise ValueError("the batch is spoilt")
        if failure == "leaves" and i == 1:
            sys.exit()
        if failure == "evaluates" and i == 1:
            step.evaluate(state, make_batch())
        state, metrics = step(state, make_batch(seed=i))
        read |= readable(metrics, f"step {i}")
    state, profile = step.profile(state, make_batch(seed=49), num_steps=1)
    read["profile"] = what_ran(profile)
    if strategy == "1f1b":
        read["measured"] = what_is_measured(pipelined, params, devices)
    if strategy != "gap":  # the process without a stage has the loss, too
        read["memory"] = str(pipelined.memory)
    read |= readable(state, "state")
    read["plan"] = str(pipelined.plan)
    read |= readable(step.evaluate(state, make_batch(seed=50)), "evaluation")
    read |= readable(pipelined.value_and_grad(state.params, make_batch(seed=50)), "gradient")
    read |= readable(pipelined.value_and_grad(params, make_batch(seed=51)), "of host arrays")
    for i, stage in enumerate(pipelined.stages):  # those of other processes, too
        if stage.backward is not None:
            read[f"stage {i}"] = stage.backward.as_text("stablehlo")
            read[f"flops of stage {i}"] = str(stage.backward.cost_analysis()["flops"])
    return read


def profile_alone(devices):
    """Profile a pipeline of this process's own devices; the other processes do nothing for it."""
    pipelined = jaxptis.pipeline(
        loss_fn, num_microbatches=NUM_MICROBATCHES, devices=devices, strategy="1f1b", has_aux=True
    )
    params = {"embedding": normal(7, OUT, WIDTH), "blocks": make_params(2)["blocks"]}
    step = pipelined.train_step(optax.sgd(1e-2))
    _, profile = step.profile(step.init(params, make_batch()), make_batch(), num_steps=1)
    assert len(profile.timeline.spans) == len(devices)
    assert profile.clock_error_s == 0


def what_is_measured(pipelined, params, devices):
    """Return what is known, and see that all processes have measured the same of it."""
    options = dataclasses.replace(pipelined.options, costs="measured")
    costs = analyse(loss_fn, *types((params, make_batch())), options).costs
    compiler = Compiler(devices)
    cluster = measure_links(options.cluster, compiler)
    compiler.processes.check_same("costs", to_json(costs))
    compiler.processes.check_same("cluster", str(cluster))
    assert all(link.latency_s > 0 for link in cluster.links.values())
    return str([[layer.name for layer in costs.layers], *cluster.links])


def types(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def what_ran(profile):
    """Return the tasks and transfers, after a look at when they were."""
    timeline, error_s = profile.timeline, profile.clock_error_s
    at = {span.task: span for row in timeline.spans for span in row}
    for each in timeline.transfers:
        readers = [span for task, span in at.items() if task.stage == each.reader]
        assert at[each.made_by].end_s <= each.start_s + 2 * error_s
        assert any(each.end_s <= span.start_s + 2 * error_s for span in readers)
    tasks = [[str(span.task) for span in row] for row in timeline.spans]
    sent = sorted((t.source, t.target, str(t.made_by), t.num_bytes) for t in timeline.transfers)
    return f"{tasks} {sent}"


def readable(tree, name):
    """Return a digest of each leaf that this process has a copy of."""
    return {
        f"{name}{jax.tree_util.keystr(path)}": hashlib.sha256(np.asarray(leaf)).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not isinstance(leaf, jax.Array) or leaf.addressable_shards
    }


def main(argv):
    devices = distributed.join(NUM_DEVICES)
    processes.LOST_S = 5.0
    index = jax.process_index()
    read = run(devices, STRATEGY.value, FAILURE.value if index == FAILING else None)
    if index == 1:
        profile_alone([device for device in devices if processes.is_local(device)])
    pathlib.Path(RESULTS_TO.value, f"{index}.json").write_text(json.dumps(read))


if __name__ == "__main__":
    app.run(main)

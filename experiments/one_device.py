"""A pipeline with all its stages on one device, beside the plain step that it must equal.

The plain step is one jitted program: gradients accumulated over the microbatches in a `lax.scan`,
then the update; its state is donated. It computes nothing again, so the pipeline is measured once
without recomputation, and once as stages are by default, saving less. In both, as in the plain
step, a microbatch goes forward and back before the next begins.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxptis
from jaxptis.plan import Recompute, Task
from models import next_token_loss
from models.llama2 import Llama2, Llama2Config

NUM_STAGES = 4
NUM_WARM_UP_STEPS = 3
RECOMPUTE: tuple[Recompute, ...] = ("none", "cheap")

Step = Callable[[], jax.Array]
"""Takes the next training step, waits until it is done, and returns the loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of every step: of all the process's threads, and of the clock on the wall."""

    cpu_s: tuple[float, ...]
    wall_s: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The steps of a pipeline and the plain ones, taken in turns."""

    recompute: Recompute
    num_tasks: int
    pipeline: Cost
    plain: Cost

    @property
    def cpu_ratio(self) -> float:
        """CPU time of the pipeline over that of the plain step, of medians."""
        return statistics.median(self.pipeline.cpu_s) / statistics.median(self.plain.cpu_s)

    @property
    def cpu_quartiles(self) -> list[float]:
        """Of the ratios of steps side by side: a quarter is below the first, a half, three."""
        pairs = zip(self.pipeline.cpu_s, self.plain.cpu_s, strict=True)
        ratios = [pipeline_s / plain_s for pipeline_s, plain_s in pairs]
        return statistics.quantiles(ratios, n=4, method="inclusive")

    @property
    def wall_ratio(self) -> float:
        """Wall time likewise."""
        return statistics.median(self.pipeline.wall_s) / statistics.median(self.plain.wall_s)


def make_config(model_width: int) -> Llama2Config:
    """Returns a LLaMA-2 over bytes, of four blocks."""
    return Llama2Config(
        vocab_size=256,
        model_width=model_width,
        mlp_width=11 * model_width // 4,
        num_blocks=4,
        num_heads=4,
        num_kv_heads=2,
        dtype=jnp.float32,
    )


def compare(
    config: Llama2Config,
    *,
    num_microbatches: int,
    microbatch_size: int,
    sequence_length: int,
    num_steps: int,
) -> list[Comparison]:
    """Takes `num_steps` steps of the pipelines and of the plain step, in turns, from one state.

    Raises:
      ValueError: the two do not have the same losses.
    """
    apply: Callable[..., Any] = Llama2(config).apply

    def loss_fn(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return next_token_loss(functools.partial(apply, {"params": params}), batch)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    shape = num_microbatches * microbatch_size, sequence_length + 1
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    batch = jax.device_put({"tokens": tokens}, jax.devices()[0])
    params = jax.jit(Llama2(config).init)(jax.random.key(0), tokens[:1, :-1])["params"]

    plans = [_plan(loss_fn, params, batch, num_microbatches, each) for each in RECOMPUTE]
    steps = [_pipeline_step(loss_fn, optimizer, params, batch, plan) for plan in plans]
    steps.append(_plain_step(loss_fn, optimizer, params, batch, num_microbatches))
    *losses, plain_losses = ([float(step()) for _ in range(NUM_WARM_UP_STEPS)] for step in steps)
    if not np.allclose(losses, plain_losses, rtol=1e-4):
        raise ValueError(f"losses {losses} in the pipelines, but {plain_losses} in plain steps")
    *costs, plain = _costs(steps, num_steps)
    return [
        Comparison(recompute=recompute, num_tasks=len(plan.schedule[0]), pipeline=cost, plain=plain)
        for recompute, plan, cost in zip(RECOMPUTE, plans, costs, strict=True)
    ]


def _plan(
    loss_fn: Any, params: Any, batch: Any, num_microbatches: int, recompute: Recompute
) -> jaxptis.Plan:
    """Returns a plan with balanced stages, all on one device, one microbatch after the other."""
    pipelined = jaxptis.pipeline(
        loss_fn,
        num_microbatches=num_microbatches,
        devices=jax.devices()[:1],
        strategy=f"list(stages_per_device={NUM_STAGES})",
    )
    plan = pipelined.bind(None, params, batch).compiled.pipeline.plan
    there = [("F", stage) for stage in range(NUM_STAGES)]
    back = [("B", stage) for stage in reversed(range(NUM_STAGES))]
    row = [Task(stage, kind, m) for m in range(num_microbatches) for kind, stage in there + back]
    return jaxptis.Plan(
        stages=tuple(
            dataclasses.replace(stage, device=0, recompute=recompute) for stage in plan.stages
        ),
        schedule=(tuple(row),),
    )


def _pipeline_step(
    loss_fn: Any,
    optimizer: optax.GradientTransformation,
    params: Any,
    batch: Any,
    plan: jaxptis.Plan,
) -> Step:
    pipelined = jaxptis.pipeline(
        loss_fn,
        num_microbatches=plan.num_microbatches,
        devices=jax.devices()[:1],
        strategy=plan,
    )
    train_step = pipelined.train_step(optimizer)
    state = train_step.init(params, batch)

    def step() -> jax.Array:
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))
        return metrics["loss"]

    return step


def _plain_step(
    loss_fn: Any,
    optimizer: optax.GradientTransformation,
    params: Any,
    batch: Any,
    num_microbatches: int,
) -> Step:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        def add_microbatch(sums: Any, microbatch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(params, microbatch)), None

        gradient = jax.value_and_grad(loss_fn)
        microbatches = jax.tree.map(lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), batch)
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(add_microbatch, zeros, microbatches)
        loss, grads = jax.tree.map(lambda x: x / num_microbatches, sums)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = jax.tree.map(jnp.copy, params)
    opt_state = optimizer.init(params)

    def step() -> jax.Array:
        nonlocal params, opt_state
        params, opt_state, loss = train_step(params, opt_state, batch)
        jax.block_until_ready((params, opt_state, loss))
        return loss

    return step


def _costs(steps: Sequence[Step], num_steps: int) -> list[Cost]:
    """Take all steps in turns, so that what else the machine does falls on all of them."""
    cpu_s: list[list[float]] = [[] for _ in steps]
    wall_s: list[list[float]] = [[] for _ in steps]
    for _ in range(num_steps):
        for i, step in enumerate(steps):
            started = time.process_time(), time.perf_counter()
            step()
            cpu_s[i].append(time.process_time() - started[0])
            wall_s[i].append(time.perf_counter() - started[1])
    return [Cost(cpu_s=tuple(c), wall_s=tuple(w)) for c, w in zip(cpu_s, wall_s, strict=True)]

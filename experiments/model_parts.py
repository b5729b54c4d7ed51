r"""Measures our Mamba-2 scan and our experts beside the best that packages have: ours over theirs.

python -m experiments.model_parts --json_output=experiments/results/model_parts.json

One of the packages is made for another JAX than ours, so give it an environment of its own:

    python3.12 -m venv /tmp/parts
    /tmp/parts/bin/pip install jax-linear-attention==0.1.0 mamba2-jax==1.1.2 \
        flax optax absl-py rich safetensors

On a CPU set MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000: glibc
otherwise gives a program with 32 MiB of temporaries or more other pages in each call, and one with
less those that it had, so that one of them takes half as long again.

Theirs are a Mamba-2 of each package, with chunks of several lengths; and a mixture of experts in
two ways, router included. "room" drops what finds no room with its expert; it is given as much room
as the fullest expert needs, which nobody knows beforehand. "dropless" is what ours is, and calls
jax.lax.ragged_dot. A ratio is the median of those of pairs, ours and right after it theirs: a
shared machine can be twice as slow for seconds, which falls on both of a pair, and on few of them.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.json_output import write_json
from models.deepseek import SIZES
from models.parts.mamba import chunk_scan
from models.parts.moe import Router, apply_experts

try:
    import equinox
    from jla.layers.moe import MoE
    from jla.models.config import MoEConfig
    from jla.ops.chunked import simple_gla
    from mamba2_jax.modeling import ssd_forward
except ImportError as error:
    raise SystemExit(f"{error}; its docstring says what to install") from error

CHUNK_LENGTHS = 64, 128, 256
OUR_CHUNK_LENGTH = 64
HEAD_WIDTH, STATE_WIDTH = 64, 128
# Positions, heads, groups of heads.
SCANS = (1024, 16, 8), (1024, 16, 1), (2048, 16, 8)
# Tokens, and how uneven the choice is: from 0, at random, upwards.
CHOICES = (64, 0), (1024, 0), (4096, 0), (1024, 8)
# With 1024 tokens a single gradient without drops takes it twenty seconds.
MOST_TOKENS_DROPLESS = 64
EXPERTS = dataclasses.replace(
    SIZES["V2-Lite"], model_width=512, expert_width=352, dtype=jnp.float32
)

NUM_REPETITIONS = flags.DEFINE_integer(
    "num_repetitions", 9, "How often everything is timed.", lower_bound=2
)
flags.declare_key_flag("json_output")  # --help lists it

Case = tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]
"""An implementation, and its arguments."""


def main(argv: list[str]) -> None:
    """Measures, prints the ratios, and writes them to --json_output."""
    if argv[1:]:
        raise app.UsageError(f"{argv[1:]} belong to no flag; write --flag=value")
    ratios = {}
    for num_positions, num_heads, num_groups in SCANS:
        name = f"scan: {num_positions} positions, {num_heads} heads, {num_groups} groups"
        ratios[name] = compare(scans(num_positions, num_heads, num_groups))
    for num_tokens, slope in CHOICES:
        name = f"experts: {num_tokens} tokens, {'uneven' if slope else 'even'}"
        ratios[name] = compare(experts(num_tokens, slope))
    report(ratios)
    write_json(
        {
            "num_repetitions": NUM_REPETITIONS.value,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "num_cpus": os.cpu_count(),
            "ours_over_theirs": ratios,
        }
    )


def scans(num_positions: int, num_heads: int, num_groups: int) -> dict[str, Case]:
    """Returns ours, which comes first, and theirs with chunks of several lengths."""
    rng = np.random.default_rng(0)
    widths = (num_heads, HEAD_WIDTH), (num_groups, STATE_WIDTH), (num_groups, STATE_WIDTH)
    x, B, C = (jnp.float32(rng.normal(size=(1, num_positions, *width))) for width in widths)
    dt = jnp.float32(rng.uniform(0.001, 0.1, size=(1, num_positions, num_heads)))
    A = -jnp.float32(rng.uniform(1, 16, size=num_heads))

    def mamba2_jax(length: int, x: Any, dt: Any, A: Any, B: Any, C: Any) -> jax.Array:
        B, C = (jnp.repeat(a, num_heads // num_groups, axis=2) for a in (B, C))
        zeros = jnp.zeros(num_heads)
        before_softplus = jnp.log(jnp.expm1(dt))
        return ssd_forward(x, before_softplus, A, B, C, length, zeros, zeros, 0.0, jnp.inf)[0]

    def linear_attention(length: int, x: Any, dt: Any, A: Any, B: Any, C: Any) -> jax.Array:
        B, C = (jnp.repeat(a, num_heads // num_groups, axis=2) for a in (B, C))
        return simple_gla(C, B, x * dt[..., None], dt * A, scale=1.0, chunk_size=length)[0]

    args = x, dt, A, B, C
    ours = functools.partial(chunk_scan, chunk_length=OUR_CHUNK_LENGTH)
    theirs = {
        f"{name}, chunks of {length}": (functools.partial(function, length), args)
        for name, function in (
            ("mamba2-jax", mamba2_jax),
            ("jax-linear-attention", linear_attention),
        )
        for length in CHUNK_LENGTHS
    }
    return {"ours": (ours, args), **theirs}


def experts(num_tokens: int, slope: float) -> dict[str, Case]:
    """Returns ours, which comes first, and theirs; the first experts are chosen more by `slope`."""
    c = EXPERTS
    E, D, F = c.num_experts, c.model_width, c.expert_width
    rng = np.random.default_rng(0)
    x, router, gate, up = (
        jnp.float32(scale * rng.normal(size=shape))
        for scale, shape in (
            (1, (1, num_tokens, D)),
            (D**-0.5, (D, E)),
            (D**-0.5, (E, D, F)),
            (D**-0.5, (E, D, F)),
        )
    )
    down = jnp.float32(F**-0.5 * rng.normal(size=(E, F, D)))
    if slope:
        x, router = x.at[..., 0].set(1), router.at[0].set(-slope * jnp.arange(E) / E)

    def route(x: jax.Array, router: jax.Array) -> Any:
        return Router(c).apply({"params": {"kernel": router}}, x)

    def ours(x: jax.Array, router: jax.Array, *params: jax.Array) -> jax.Array:
        return apply_experts(x, *route(x, router), *params)

    def theirs(room: float | None, x: Any, router: Any, gate_up: Any, down: Any) -> jax.Array:
        config = MoEConfig(
            num_experts=E,
            top_k=c.experts_per_token,
            d_ff_expert=F,
            normalize_top_k=False,
            capacity_factor=room,
        )
        layer = MoE(D, config, key=jax.random.key(0), std=1.0, compute_dtype="float32")
        layer = equinox.tree_at(
            lambda moe: (moe.router, moe.gate_up, moe.down), layer, (router, gate_up, down)
        )
        return layer(x)[0]

    with jax.default_matmul_precision("highest"):  # as results are compared
        fullest = int(jnp.bincount(route(x, router)[0].reshape(-1)).max())
    room = fullest * E / (num_tokens * c.experts_per_token)
    args = x, router, jnp.stack([gate, up], axis=2), down
    cases: dict[str, Case] = {
        "ours": (ours, (x, router, gate, up, down)),
        "jax-linear-attention, room": (functools.partial(theirs, room), args),
    }
    if num_tokens <= MOST_TOKENS_DROPLESS:
        cases["jax-linear-attention, dropless"] = functools.partial(theirs, None), args
    return cases


def compare(cases: Mapping[str, Case]) -> dict[str, dict[str, float]]:
    """Returns, for each of theirs, the medians of ours over theirs, forward and with gradients.

    Raises:
      ValueError: the results differ by more than 1e-4 of the largest.
    """
    runs = {}
    for name, (function, args) in cases.items():
        runs[name] = [
            functools.partial(jax.jit(function), *args),
            functools.partial(jax.jit(_gradients(function, len(args))), *args),
        ]
    expected: tuple[np.ndarray, ...] | None = None
    for name, (forward, both) in runs.items():
        # A GPU's tensor cores would round by more than what tells a wrong result.
        with jax.default_matmul_precision("highest"):
            found = np.asarray(forward()), np.asarray(both()[0])
        expected = expected or found
        for ours, theirs in zip(expected, found, strict=True):
            if not np.abs(ours - theirs).max() <= 1e-4 * np.abs(ours).max():
                raise ValueError(f"results of {name} are not ours; compare them one by one")
    for forward, both in runs.values():
        jax.block_until_ready((forward(), both()))
    ours_runs = runs.pop("ours")
    # Each forward comes after a backward of the other, and each backward after its own forward.
    pairs = [
        {name: (_seconds(ours_runs), _seconds(theirs_runs)) for name, theirs_runs in runs.items()}
        for _ in range(NUM_REPETITIONS.value)
    ]
    ratios = {}
    for name in runs:
        ours_and_theirs_s = np.array([pair[name] for pair in pairs])
        medians = np.median(ours_and_theirs_s[:, 0] / ours_and_theirs_s[:, 1], axis=0)
        ratios[name] = {"forward": float(medians[0]), "forward_and_backward": float(medians[1])}
    return ratios


def _seconds(runs: Sequence[Callable[[], Any]]) -> list[float]:
    seconds = []
    for run in runs:
        start_s = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start_s)
    return seconds


def _gradients(function: Callable[..., jax.Array], num_args: int) -> Callable[..., Any]:
    """Returns the gradients of the mean square of the result, of all arguments."""
    return jax.grad(lambda *args: (function(*args) ** 2).mean(), argnums=range(num_args))


def report(ratios: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Prints a line for each of theirs."""
    table = Table("ours over", "forward", "forward and backward", box=None)
    for name, others in ratios.items():
        table.add_row(name)
        for other, ratio in others.items():
            table.add_row(f"  {other}", *(f"{each:.2f}" for each in ratio.values()))
    Console().print(table)


if __name__ == "__main__":
    app.run(main)

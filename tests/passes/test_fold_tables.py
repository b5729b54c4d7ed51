import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import jaxprs
from passes.cut_stages import cut_stages
from passes.fold_tables import fold_tables
from tests.passes.on_host import assert_bitwise, layers_of, random_boundaries, run_forward
from tests.passes.small_models import MODELS, case

PARAMS = {"w": jnp.linspace(-1.0, 2.0, 9).reshape(3, 3)}
BATCH = {"x": jnp.linspace(-2.0, 1.0, 12).reshape(4, 3)}


def one_stage(loss_fn):
    """Return the stage of a function of one layer, and what it becomes."""
    graph = layers_of(loss_fn, PARAMS, BATCH, has_aux=True)
    before = cut_stages(graph, [0, len(graph.layers)])
    after = fold_tables(before)
    expected, _ = run_forward(before, PARAMS, BATCH)
    found, _ = run_forward(after, PARAMS, BATCH)
    # The table is compiled as one program; here the rest runs operation by operation.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    return before.stages[0], after.stages[0]


def change(loss_fn):
    """Return by how much the counts of primitives change, and the new constants."""
    before, after = one_stage(loss_fn)
    old, new = (jaxprs.count_primitives(stage.forward) for stage in (before, after))
    counts = {name: new.get(name, 0) - count for name, count in old.items()}
    assert new.keys() <= old.keys()
    added = after.constants[: len(after.constants) - len(before.constants)]
    return {name: count for name, count in counts.items() if count}, added


@pytest.mark.parametrize("name", MODELS)
def test_the_results_stay(name):
    c = case(name)
    stages = cut_stages(c.graph, random_boundaries(len(c.graph.layers), 0))
    folded = fold_tables(stages)
    folded.check()
    expected, _ = run_forward(stages, c.params, c.batch)
    found, _ = run_forward(folded, c.params, c.batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    again = fold_tables(folded)
    for once, twice in zip(folded.stages, again.stages, strict=True):
        assert str(once.forward) == str(twice.forward)
        assert_bitwise(list(once.constants), list(twice.constants))


def test_rotary_tables_are_constants_and_equal_ones_one():
    def loss(p, batch):
        x = batch["x"] @ p["w"]
        for _ in range(2):
            angles = 100.0 ** (-jnp.arange(3.0) / 3)
            x = jnp.tanh(x * jnp.cos(angles) + x * jnp.sin(angles))
        return jnp.mean(x), ()

    counts, added = change(loss)
    assert [counts[name] for name in ("cos", "sin", "pow")] == [-2, -2, -2]
    assert "tanh" not in counts
    angles = 100.0 ** (-np.arange(3.0) / 3)
    np.testing.assert_allclose(
        sorted(map(tuple, added)), sorted(map(tuple, (np.cos(angles), np.sin(angles)))), rtol=1e-6
    )


def test_what_is_cheap_stays_a_computation():
    def loss(p, batch):
        x = batch["x"] @ p["w"]
        mask = jnp.arange(4.0)[:, None] >= jnp.arange(3.0)
        return jnp.mean(jnp.where(mask, jnp.tanh(x), 0.0)), ()

    assert change(loss) == ({}, ())


def test_cheap_equations_behind_a_table_stay():
    def loss(p, batch):
        table = jnp.broadcast_to(jnp.exp(jnp.arange(3.0))[None] + 1.0, (4, 3))
        return jnp.mean(batch["x"] @ p["w"] * table), ()

    counts, (table,) = change(loss)
    assert table.shape == (3,)
    assert counts["exp"] == -1 and "add" not in counts


def test_a_large_table_is_made_from_a_small_one():
    def loss(p, batch):
        row = jnp.sin(jnp.arange(3.0))
        large = jnp.exp(jnp.broadcast_to(row[:, None], (3, 2**22)))
        return jnp.mean(batch["x"] @ p["w"]) + jnp.mean(p["w"] @ large), ()

    counts, (table,) = change(loss)
    assert counts["sin"] == -1 and "exp" not in counts
    np.testing.assert_allclose(table, np.sin(np.arange(3.0)), rtol=1e-6)


def test_a_table_that_is_a_result_stays():
    def loss(p, batch):
        table = jnp.cos(jnp.arange(3.0))
        return jnp.mean(batch["x"] @ p["w"] * table), table

    assert change(loss) == ({}, ())


def test_what_depends_on_the_batch_stays():
    def loss(p, batch):
        return jnp.mean(jnp.cos(batch["x"]) * (batch["x"] @ p["w"])), ()

    assert change(loss) == ({}, ())


@pytest.mark.parametrize("scales", [(0.5, 2.0, 0.5), (0.1, 0.1000001, 0.3)])
def test_every_stage_has_its_own_table(scales):
    """Equal tables are computed once; of others each number is in their text."""
    params = {f"w{i}": PARAMS["w"] for i in range(len(scales))}

    def loss(p, batch):
        x = batch["x"]
        for w, scale in zip(p.values(), scales, strict=True):
            x = jnp.tanh(x @ w * jnp.cos(scale * jnp.arange(3.0)))
        return jnp.mean(x), ()

    graph = layers_of(loss, params, BATCH, has_aux=True)
    stages = fold_tables(cut_stages(graph, range(len(scales) + 1)))
    for stage, scale in zip(stages.stages, scales, strict=True):
        (table,) = stage.constants
        np.testing.assert_array_equal(table, np.asarray(jnp.cos(scale * jnp.arange(3.0))))

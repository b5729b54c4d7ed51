"""The costs that a user gives, or has measured, are those that a pipeline is planned by."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen

import jaxptis
from jaxptis import choose_costs as choosing
from jaxptis.performance import Costs, LayerCost
from jaxptis.performance import measure as measuring
from jaxptis.performance.costs_file import to_json
from tests.small_models import OUT, WIDTH, assert_close, block, loss_fn, make_batch, make_params

LAYERS = ("first", "blocks/0", "blocks/1", "head")


def costs_of(*weights, names=LAYERS):
    """Return costs of layers that take these seconds, a third of them forward."""
    return Costs(
        tuple(
            LayerCost(name=name, forward_s=w, backward_s=2 * w, input_grad_s=w, weight_grad_s=w)
            for name, w in zip(names, weights, strict=True)
        )
    )


def compiled(costs, **options):
    pipelined = jaxptis.pipeline(
        loss_fn,
        num_microbatches=2,
        devices=jax.devices()[:2],
        costs=costs,
        **{"strategy": "1f1b", **options},
    )
    return pipelined.compile(make_params(2), make_batch())


def refuse(costs, message):
    with pytest.raises(ValueError, match=message):
        compiled(costs)


@pytest.mark.parametrize(
    ("weights", "boundaries"),
    [((9, 1, 1, 1), (0, 1, 4)), ((1, 1, 1, 1), (0, 2, 4)), ((1, 1, 1, 9), (0, 3, 4))],
)
def test_layers_are_balanced_by_the_costs_given(weights, boundaries, tmp_path):
    costs = costs_of(*weights)
    costs.save(tmp_path / "costs.json")
    for given in costs, tmp_path / "costs.json", str(tmp_path / "costs.json"):
        pipelined = compiled(given)
        assert pipelined.plan.boundaries == boundaries
        assert pipelined.costs == costs
        assert pipelined.timeline.busy_s == tuple(
            2 * 3 * sum(weights[a:b]) for a, b in pairwise(boundaries)
        )


def test_what_skips_layers_is_looked_up_in_the_model():
    """Costs of another model may say anything, and files that people write often nothing."""

    def loss(params, batch):
        return loss_fn(params, batch) + jnp.mean(batch["x"] @ params["first"] * last(params, batch))

    def last(params, batch):
        x = batch["x"] @ params["first"]
        for p in params["blocks"]:
            x = block(p, x)
        return x

    pipelined = jaxptis.pipeline(
        loss, num_microbatches=2, devices=jax.devices()[:2], costs="estimated", strategy="1f1b"
    )
    pipelined.compile(make_params(2), make_batch())
    costs = pipelined.costs
    assert any(layer.skipping_bytes for layer in costs.layers)
    layers = tuple(replace(layer, skipping_bytes=7) for layer in costs.layers)
    given = jaxptis.pipeline(
        loss,
        num_microbatches=2,
        devices=jax.devices()[:2],
        costs=replace(costs, layers=layers),
        strategy="1f1b",
    )
    given.compile(make_params(2), make_batch())
    assert given.costs == costs


def test_values_do_not_depend_on_the_costs():
    params, batch = make_params(2), make_batch()
    got = compiled(costs_of(9, 1, 1, 1)).value_and_grad(params, batch)
    assert_close(got, jax.value_and_grad(loss_fn)(params, batch), rtol=1e-6)


def test_by_default_costs_are_estimated():
    pipelined = jaxptis.pipeline(
        loss_fn, strategy="1f1b", num_microbatches=2, devices=jax.devices()[:2]
    )
    pipelined.compile(make_params(2), make_batch())
    assert (pipelined.costs.source, pipelined.costs.device) == ("estimated", "cpu")
    assert [layer.name for layer in pipelined.costs.layers] == list(LAYERS)


def test_measured_costs(monkeypatch):
    """The clock says that the programs of the head take a hundred times as long."""

    def seconds(programs):
        _, *others = programs
        return [[0.5] * 2, *([100.0 if is_head(each) else 1.0] * 2 for each in others)]

    def is_head(program):
        return any(x.shape == (WIDTH, OUT) for x in program.arguments[0].values())

    monkeypatch.setattr(measuring, "_seconds", seconds)
    pipelined = compiled("measured")
    assert pipelined.costs.source == "measured"
    assert pipelined.plan.boundaries == (0, 3, 4)


@pytest.mark.parametrize("are_here", [True, False])
def test_measured_on_the_arrays_that_are_there(monkeypatch, are_here):
    """Given are parts of parameters and the first microbatch; of types, nothing."""
    asked = []

    def measure(layers, device, *, values, ready):
        asked.append(values)
        ready()
        return costs_of(1, 1, 1, 1)

    monkeypatch.setattr(choosing, "measure", measure)
    params, batch = make_params(2), make_batch()
    given = (params, batch) if are_here else jax.eval_shape(lambda *x: x, params, batch)
    pipelined = jaxptis.pipeline(
        loss_fn, strategy="1f1b", num_microbatches=2, devices=jax.devices()[:2], costs="measured"
    )
    pipelined.compile(*given)
    (values,) = asked
    expected = [*jax.tree.leaves(params), *(x[: len(x) // 2] for x in jax.tree.leaves(batch))]
    assert_close(list(values.values()), expected if are_here else [], rtol=0)


def test_a_trainer_shows_its_costs():
    class Two(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(OUT)(linen.Dense(WIDTH)(x))

    costs = costs_of(1, 2, names=("Dense_1", "Dense_0"))  # the first to be called is made last
    two = jaxptis.pipeline(
        strategy="1f1b", num_microbatches=2, devices=jax.devices()[:1], costs=costs
    )(Two)
    trainer = two().trainer(
        loss=lambda model, batch: ((model(batch["x"]) - batch["y"]) ** 2).mean(),
        optimizer=optax.sgd(0.1),
    )
    trainer.init(jax.random.key(0), make_batch())
    assert trainer.costs == costs


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            LAYERS[:3],
            r"layer 3 is None there, in the model 'head' \(3 layers there, 4 in the model",
        ),
        ((*LAYERS, "more"), "layer 4 is 'more' there, in the model None"),
        (("first", "blocks/1", "blocks/0", "head"), "layer 1 is 'blocks/1' there, in the model 'b"),
    ],
)
def test_costs_of_other_layers(names, message, tmp_path):
    costs = costs_of(*[1.0] * len(names), names=names)
    refuse(costs, f"^costs: these are costs of another model: {message}")
    costs.save(tmp_path / "costs.json")
    refuse(tmp_path / "costs.json", rf"costs\.json: these are costs of another model: {message}")


@pytest.mark.parametrize("costs", ["measurd", "no/such/file.json", 42, None])
def test_costs_that_are_no_file(costs):
    refuse(costs, r"costs .* are neither \"estimated\" nor \"measured\" nor the path of a file")


def test_a_cost_file_that_is_wrong(tmp_path):
    path = tmp_path / "costs.json"
    costs_of(1, 2, 3, 4).save(path)
    path.write_text(path.read_text().replace('"forward_s": 1', '"forward_s": -1'))
    refuse(path, r"costs\.json: forward_s of kind 'first' is -1; use finite seconds of 0 or more")


def test_of_several_processes_the_means_are_taken():
    own = replace(costs_of(1, 2, 3, 4), start_s=1.0, source="measured")
    other = replace(costs_of(3, 2, 1, 0), start_s=2.0, source="measured")

    class Processes:
        def share(self, text):
            return [text, to_json(other)]

    mean = choosing._mean(own, Processes())
    assert mean == replace(costs_of(2, 2, 2, 2), start_s=1.5, source="measured")


def test_with_measured_costs_the_links_are_measured(monkeypatch):
    """Unless the user says what they are."""
    monkeypatch.setattr(measuring, "ENOUGH_S", 0.0)
    given = jaxptis.Cluster.of(jax.devices()[:2])
    assert compiled("measured", cluster=given).options.cluster is given
    found = compiled("measured").options.cluster
    assert found.devices == given.devices and [*found.links] == [(0, 1), (1, 0)]
    assert compiled(costs_of(1, 1, 1, 1)).options.cluster == given

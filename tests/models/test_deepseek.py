import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from models import MODELS
from models.deepseek import SIZES, Block, DeepSeek, TokenAfterNext, training_loss
from models.hugging_face import deepseek as hugging_face
from models.parts.moe import Router, apply_experts, balance_loss, steer_biases
from passes.jaxprs import count_primitives
from tests.models.small import DEEPSEEK_V2 as V2
from tests.models.small import DEEPSEEK_V3 as V3
from tests.models.small import YARN, make_reference, with_transformers

RNG = np.random.default_rng(0)
TOKENS_BT = RNG.integers(0, 256, size=(2, 13)).astype(np.int32)


def shapes(config):
    """The shape of every parameter, by its path."""
    params = jax.eval_shape(DeepSeek(config).init, jax.random.key(0), TOKENS_BT)["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def count(config):
    """Parameters of the main model, as they are published."""
    main = (shape for path, shape in shapes(config).items() if not path.startswith("after_next/"))
    return sum(map(math.prod, main))


# Counted from the shapes of transformers' models too, in the test below; V3 without what predicts
# further tokens, and with its 58 correction biases.
@pytest.mark.parametrize(
    ("size", "published"), [("V2-Lite", 15_706_484_224), ("V3", 671_026_419_200)]
)
def test_published_sizes_have_the_published_number_of_parameters(size, published):
    assert count(SIZES[size]) == published


@with_transformers
@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_number_of_parameters_that_transformers_counts(size):
    torch = pytest.importorskip("torch")

    def count_theirs(num_dense, num_sparse):
        config = dataclasses.replace(
            SIZES[size], num_dense_blocks=num_dense, num_blocks=num_dense + num_sparse
        )
        with torch.device("meta"):
            reference = make_reference("deepseek", config)
        return sum(tensor.numel() for tensor in reference.state_dict().values())

    # The whole V3 has 45,000 modules, which take torch a minute.
    dense, sparse, both = count_theirs(1, 0), count_theirs(0, 1), count_theirs(1, 1)
    num_dense = SIZES[size].num_dense_blocks
    num_sparse = SIZES[size].num_blocks - num_dense
    blocks = num_dense * (both - sparse) + num_sparse * (both - dense)
    assert count(SIZES[size]) == dense + sparse - both + blocks


@pytest.mark.parametrize("config", [V2, V3, dataclasses.replace(V2, yarn=YARN), *SIZES.values()])
def test_a_written_config_is_read_as_the_same(config):
    types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    assert hugging_face.read_config(hugging_face.write_config(config), **types) == config


YARN_STORED = hugging_face.write_config(dataclasses.replace(V3, yarn=YARN))["rope_scaling"]


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (V2, {"topk_method": "group_limited_greedy"}, "not supported; V2-Lite has 'greedy'"),
        (V3, {"norm_topk_prob": False}, "norm_topk_prob False"),
        (V3, {"scoring_func": "softmax"}, "only 'sigmoid' is supported"),
        (V3, {"rope_interleave": False}, "rope_interleave is False"),
        (
            V3,
            {"rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.5}},
            "have to be equal",
        ),
        (V3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        (V3, {"rope_scaling": YARN_STORED | {"attention_factor": 3.0}}, "attention_factor is 3.0"),
        (V3, {"rope_scaling": YARN_STORED | {"truncate": False}}, "truncate is False"),
    ],
)
def test_what_is_not_supported_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        hugging_face.read_config(hugging_face.write_config(config) | change)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (V3, {"scoring": "tanh"}, "use 'softmax' or 'sigmoid'"),
        (V3, {"num_dense_blocks": 4}, "not between 0 and num_blocks 3"),
        (V3, {"rotary_width": 7}, "make it even"),
        (V3, {"value_width": 21}, "wider than keys of 12 [+] 8"),
        (V3, {"num_shared_experts": 0}, "1 or more"),
        (V2, {"num_groups": 2}, "leave both at 1"),
        (V3, {"groups_per_token": 5}, "not between 1 and num_groups 4"),
        (V3, {"num_experts": 4}, "4 groups of two or more"),
        (V3, {"experts_per_token": 5}, "5 of 4 experts"),
    ],
)
def test_configs_that_fit_no_model_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize(
    ("change", "message"), [({"factor": 0.5}, "1 or more"), ({"slow_turns": 40.0}, "smaller one")]
)
def test_yarn_that_stretches_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(YARN, **change)


def routing_case(config):
    """An input (B, T, D), and parameters of the router with a bias of either sign."""
    x_BTD = RNG.normal(size=(2, 7, config.model_width)).astype(np.float32)
    params = {"kernel": RNG.normal(size=(config.model_width, config.num_experts))}
    if config.scoring == "sigmoid":
        params["bias"] = RNG.normal(size=config.num_experts)
    return x_BTD, jax.tree.map(np.float32, params)


def route_one(config, x_D, params):
    """What the papers say of one token: its experts and their weights, by number of the expert."""
    logits_E = x_D.astype(np.float64) @ params["kernel"]
    if config.scoring == "softmax":
        scores_E = np.exp(logits_E) / np.exp(logits_E).sum()
        best = sorted(range(config.num_experts), key=lambda e: -scores_E[e])
        chosen = best[: config.experts_per_token]
        return scores_E, {e: scores_E[e] * config.routed_scale for e in chosen}
    scores_E = 1 / (1 + np.exp(-logits_E))
    biased_E = scores_E + params["bias"]
    groups = np.split(np.arange(config.num_experts), config.num_groups)
    groups.sort(key=lambda group: -np.sort(biased_E[group])[-2:].sum())
    allowed = np.concatenate(groups[: config.groups_per_token])
    chosen = sorted(allowed, key=lambda e: -biased_E[e])[: config.experts_per_token]
    total = sum(scores_E[e] for e in chosen)
    return scores_E, {e: scores_E[e] / total * config.routed_scale for e in chosen}


@pytest.mark.parametrize("config", [V2, V3])
def test_tokens_choose_the_experts_that_the_papers_say(config):
    x_BTD, params = routing_case(config)
    choice_BTC, weights_BTC = Router(config).apply({"params": params}, x_BTD)
    for b, t in np.ndindex(2, 7):
        expected = route_one(config, x_BTD[b, t], params)[1]
        found = dict(zip(choice_BTC[b, t].tolist(), weights_BTC[b, t].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)


def expert_case():
    """An input (B, T, D), its choice and weights (B, T, C), and E = 5 experts, of which 2 idle."""
    x_BTD, gate_EDF, up_EDF, down_EFD = (
        RNG.normal(size=shape).astype(np.float32)
        for shape in ((2, 7, 8), (5, 8, 6), (5, 8, 6), (5, 6, 8))
    )
    choice_BTC = np.stack([RNG.permutation([0, 3, 4])[:2] for _ in range(14)]).reshape(2, 7, 2)
    weights_BTC = RNG.uniform(0.1, 1, size=(2, 7, 2)).astype(np.float32)
    return x_BTD, choice_BTC.astype(np.int32), weights_BTC, gate_EDF, up_EDF, down_EFD


def loop_over_experts(x_BTD, choice_BTC, weights_BTC, gate_EDF, up_EDF, down_EFD):
    """Every expert applied to every token, with weight 0 where it is not chosen."""
    total_BTD = 0
    for e in range(len(gate_EDF)):
        gate_BTF = x_BTD @ gate_EDF[e]
        y_BTD = (gate_BTF / (1 + jnp.exp(-gate_BTF)) * (x_BTD @ up_EDF[e])) @ down_EFD[e]
        total_BTD += jnp.where(choice_BTC == e, weights_BTC, 0).sum(-1)[..., None] * y_BTD
    return total_BTD


def test_experts_equal_a_loop():
    case = expert_case()
    x_BTD, choice_BTC, weights_BTC, gate_EDF, up_EDF, down_EFD = case
    expected_BTD = np.zeros_like(x_BTD)
    for b, t, c in np.ndindex(choice_BTC.shape):
        e = choice_BTC[b, t, c]
        gate_F, up_F = x_BTD[b, t] @ gate_EDF[e], x_BTD[b, t] @ up_EDF[e]
        hidden_F = gate_F / (1 + np.exp(-gate_F)) * up_F
        expected_BTD[b, t] += weights_BTC[b, t, c] * (hidden_F @ down_EFD[e])
    # The same float32 sums in another order; they reach about 50.
    np.testing.assert_allclose(jax.jit(apply_experts)(*case), expected_BTD, rtol=1e-5, atol=1e-4)


def test_gradients_of_experts_equal_those_of_a_loop():
    case = expert_case()
    cotangent_BTD = RNG.normal(size=(2, 7, 8)).astype(np.float32)

    def gradients(function):
        def loss(*args):
            return (function(*args) * cotangent_BTD).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 2, 3, 4, 5)))(*case)

    for found, expected in zip(gradients(apply_experts), gradients(loop_over_experts), strict=True):
        # The same float32 sums in another order; they reach about 100.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [V2, V3])
def test_every_parameter_but_the_bias_has_a_finite_gradient(config):
    model = DeepSeek(dataclasses.replace(config, num_blocks=2))
    params = jax.jit(model.init)(jax.random.key(0), TOKENS_BT)
    gradients = jax.jit(jax.grad(lambda p: (model.apply(p, TOKENS_BT) ** 2).mean()))(params)
    for path, leaf in traverse_util.flatten_dict(gradients["params"], sep="/").items():
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf) == (not path.endswith("router/bias")), path


@pytest.mark.parametrize("config", [V2, V3])
def test_the_balance_loss_is_that_of_the_papers(config):
    x_BTD, params = routing_case(config)
    _, sown = Router(config).apply({"params": params}, x_BTD, mutable=["losses"])
    (found,) = sown["losses"]["balance"]
    num_experts, num_chosen = config.num_experts, config.experts_per_token
    expected = 0.0
    for x_TD in x_BTD:
        scores_TE = np.stack([route_one(config, x_D, params)[0] for x_D in x_TD])
        for i in range(num_experts):
            uses = sum(i in np.argsort(-scores_E)[:num_chosen] for scores_E in scores_TE)
            f = num_experts / (num_chosen * len(x_TD)) * uses
            expected += f * (scores_TE[:, i] / scores_TE.sum(-1)).mean() / len(x_BTD)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_experts_used_evenly_have_the_balance_loss_one():
    scores_BTE = np.tile(np.eye(4, dtype=np.float32), (3, 2, 1))
    np.testing.assert_allclose(balance_loss(jnp.asarray(scores_BTE), 1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(balance_loss(jnp.asarray(scores_BTE[:, :1]), 1), 4.0, rtol=1e-6)


def test_nothing_is_computed_of_a_balance_loss_that_nobody_asks_for():
    model = DeepSeek(V3)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)
    assert set(params) == {"params"}

    def apply(params, **options):
        return model.apply(params, TOKENS_BT, **options)

    sown = jax.eval_shape(functools.partial(apply, mutable=["losses"]), params)[1]
    assert set(sown["losses"]) == {"layers_1", "layers_2"}
    # In each of two blocks: the best of every group, the best groups, the best of these.
    assert count_primitives(jax.make_jaxpr(apply)(params).jaxpr)["top_k"] == 2 * 3
    asked = jax.make_jaxpr(functools.partial(apply, mutable=["losses"]))(params)
    assert count_primitives(asked.jaxpr)["top_k"] == 2 * 4


def test_the_token_after_the_next_sees_the_next():
    D = V3.model_width
    x_BTD, next_BTD = RNG.normal(size=(2, 2, 13, D)).astype(np.float32)
    model = TokenAfterNext(V3)
    params = jax.jit(model.init)(jax.random.key(0), x_BTD, next_BTD)["params"]
    scales = {f"{name}_norm": RNG.normal(size=D).astype(np.float32) for name in ("hidden", "next")}
    params |= {name: {"scale": scale} for name, scale in scales.items()}

    def norm(x_BTD):
        return x_BTD / np.sqrt((x_BTD**2).mean(-1, keepdims=True) + V3.norm_epsilon)

    joined_BTD = norm(next_BTD) * scales["next_norm"] @ params["join"]["kernel"][:D]
    joined_BTD += norm(x_BTD) * scales["hidden_norm"] @ params["join"]["kernel"][D:]
    block = Block(V3, is_dense=False)
    expected_BTD = norm(np.asarray(jax.jit(block.apply)({"params": params["block"]}, joined_BTD)))
    found_BTD = jax.jit(model.apply)({"params": params}, x_BTD, next_BTD)
    # The same float32 sums in another order.
    np.testing.assert_allclose(found_BTD, expected_BTD, rtol=1e-4, atol=1e-4)


def test_the_published_token_after_the_next_has_about_the_published_size():
    sizes = {path: math.prod(shape) for path, shape in shapes(SIZES["V3"]).items()}
    found = sum(size for path, size in sizes.items() if path.startswith("after_next/"))
    # Published in three digits, which are those of its block alone; with what joins, 11.6.
    assert found == pytest.approx(11.5e9, rel=0.01)


AFTER_NEXT = dataclasses.replace(V3, num_blocks=2, after_next=True)


def random_model(config):
    """Parameters, every one moved off its initial value, and apply with them."""
    model = DeepSeek(config)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS_BT)["params"]
    params = jax.tree.map(lambda x: np.asarray(x) + RNG.normal(size=x.shape) / 8, params)
    params = jax.tree.map(np.float32, params)
    return params, functools.partial(model.apply, {"params": params})


def test_two_tokens_are_predicted_from_one_embedding_and_one_head():
    params, apply = random_model(AFTER_NEXT)
    logits_BTV, after_BTV = apply(TOKENS_BT, after_next=True)
    (x_BTD, kernel_DV), (after_BTD, same_DV) = apply(TOKENS_BT, before_head=True, after_next=True)
    np.testing.assert_array_equal(apply(TOKENS_BT), logits_BTV)
    np.testing.assert_array_equal(same_DV, kernel_DV)
    np.testing.assert_allclose(x_BTD @ kernel_DV, logits_BTV, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after_BTD @ kernel_DV, after_BTV, rtol=1e-5, atol=1e-5)
    next_BTD = params["embed"]["embedding"][TOKENS_BT[:, 1:]]
    alone = TokenAfterNext(AFTER_NEXT).apply(
        {"params": params["after_next"]}, x_BTD[:, :-1], next_BTD
    )
    np.testing.assert_allclose(after_BTD, alone, rtol=1e-4, atol=1e-4)


def test_a_config_without_it_predicts_no_token_after_the_next():
    with pytest.raises(ValueError, match="no block that predicts the token after the next"):
        jax.eval_shape(
            functools.partial(DeepSeek(V3).init, after_next=True), jax.random.key(0), TOKENS_BT
        )


def test_the_training_loss_adds_up_its_terms():
    _, apply = random_model(AFTER_NEXT)
    batch = {"tokens": TOKENS_BT}
    loss, main = training_loss(apply, batch, balance_weight=0.5, after_next_weight=0.25)
    (logits_BTV, after_BTV), sown = apply(TOKENS_BT[:, :-1], after_next=True, mutable=["losses"])

    def mean_cross_entropy(logits_BTV, targets_BT):
        log_probs_BTV = jax.nn.log_softmax(np.asarray(logits_BTV))
        return -np.mean([log_probs_BTV[b, t, v] for (b, t), v in np.ndenumerate(targets_BT)])

    np.testing.assert_allclose(main, mean_cross_entropy(logits_BTV, TOKENS_BT[:, 1:]), rtol=1e-5)
    further = mean_cross_entropy(after_BTV, TOKENS_BT[:, 2:])
    (in_layers_1,) = sown["losses"]["layers_1"]["experts"]["router"]["balance"]
    (in_after_next,) = sown["losses"]["after_next"]["block"]["experts"]["router"]["balance"]
    expected = main + 0.25 * further + 0.5 * (in_layers_1 + in_after_next)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_biases_step_against_the_load_of_their_experts():
    x_BTD, params = routing_case(V3)

    def loads(params):
        sown = Router(V3).apply({"params": params}, x_BTD, mutable=["loads"])[1]
        return sown["loads"]["excess"][0]

    choice_BTC, _ = Router(V3).apply({"params": params}, x_BTD)
    counts_E = np.bincount(np.ravel(choice_BTC), minlength=V3.num_experts)
    excess_E = V3.num_experts * counts_E - np.size(choice_BTC)
    assert set(np.sign(excess_E)) >= {-1, 1}
    gradients = {"router": jax.grad(loads)(params), "bias": np.float32([1.0])}
    scale = np.abs(gradients["router"]["bias"]).max() / np.abs(excess_E).max()
    assert np.log2(scale) % 1 == 0 and scale * np.size(choice_BTC) * V3.num_experts <= 1
    np.testing.assert_array_equal(gradients["router"]["bias"], np.float32(scale * excess_E))

    optimizer = steer_biases(optax.sgd(2.0), speed=0.5)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients))
    np.testing.assert_allclose(updates["router"]["bias"], -0.5 * np.sign(excess_E))
    np.testing.assert_array_equal(updates["router"]["kernel"], -2.0 * gradients["router"]["kernel"])
    np.testing.assert_array_equal(updates["bias"], -2.0)  # of no router


def test_models_are_trained_with_the_published_weights():
    family = MODELS["deepseek"]
    assert family.loss(SIZES["V2-Lite"]).keywords == {
        "balance_weight": 1e-3,
        "after_next_weight": 0.0,
    }
    assert family.loss(SIZES["V3"]).keywords == {"balance_weight": 1e-4, "after_next_weight": 0.3}
    bias = {"router": {"bias": np.float32([-3.0, 0.0, 5.0])}}
    optimizer = family.steer(optax.sgd(2.0))
    updates, _ = optimizer.update(bias, optimizer.init(bias))
    np.testing.assert_allclose(updates["router"]["bias"], [0.001, 0.0, -0.001])

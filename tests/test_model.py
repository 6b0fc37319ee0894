"""The layer and the language model: causality, invariance of routes, one truth, and refusals."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_attention_jax import LanguageModel, MetaAttention, ModelConfig, RoutingHypers
from tests import making
from tests.close import assert_close, distance

BATCH, TIME, VOCAB = 2, 21, 13
CONTROLLERS = ("bayesian", "softmax", "fixed")
MODES = ("soft", "hard", "gated")
THETA = 0.6


def hypers(threshold=THETA):
    return RoutingHypers(
        strength=jnp.float32(2.0),
        preference=jnp.float32(0.3),
        costs=jnp.array([1.0, 0.15, 0.3]),
        threshold=jnp.float32(threshold),
    )


def make(controller="bayesian", mode="soft", **fields):
    """Two layers, scanned where they are alike: half the program, and the same function."""
    defaults = dict(num_layers=2, scan_layers=controller != "fixed", fixed=("local", "full"))
    return making.model(
        vocab_size=VOCAB, model_dim=16, num_heads=2, window=4, mlp_dim=32, controller=controller,
        hidden=8, mode=mode, **{**defaults, **fields}
    )


def first_layer(controller="bayesian", mode="soft", **fields):
    return make(controller, mode, num_layers=1, scan_layers=False, fixed="local", **fields)


def random_parameters(model):
    """Of the shapes that `init` says: every token is routed its own way."""
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), hypers=hypers())
    )["params"]
    rng = np.random.default_rng(1)

    def leaf(path, shape):
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.4 * rng.standard_normal(shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.lru_cache(maxsize=None)
def parameters(controller):
    return random_parameters(make(controller))


def unrolled(params):
    """The same parameters, layer by layer."""
    if "layers" not in params:
        return params
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = [jax.tree.map(lambda leaf: leaf[i], params["layers"]) for i in range(2)]
    return rest | {f"layer_{i}": layer for i, layer in enumerate(layers)}


def tokens(seed=0, shape=(BATCH, TIME)):
    return jax.random.randint(jax.random.key(seed), shape, 0, VOCAB)


@functools.lru_cache(maxsize=None)
def runner(controller, mode, sampled):
    """(tokens, segment_ids, threshold) -> Output."""
    model, params = make(controller, mode), parameters(controller)

    @jax.jit
    def run(tokens, segment_ids=jnp.ones((BATCH, TIME), jnp.int32), threshold=THETA):
        keys = jax.vmap(jax.random.key)(jnp.arange(tokens.shape[0])) if sampled else None
        return model.apply(
            {"params": params}, tokens, segment_ids=segment_ids,
            hypers=hypers(threshold), keys=keys,
        )

    return run


def seen(output):
    """What may not change: logits, routes, weights, uncertainties."""
    r = output.routing
    return [np.moveaxis(np.asarray(x), 0, 0) for x in (output.logits,)] + [
        np.moveaxis(np.asarray(x), 0, 2) for x in (r.route, r.hard, r.uncertainty, r.weights)
    ]


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_no_gradient_flows_from_later_tokens(controller, mode):
    model, params = first_layer(controller, mode), unrolled(parameters(controller))
    x = jax.random.normal(jax.random.key(2), (1, TIME, 16))
    keys = jax.random.split(jax.random.key(3), 1)  # training: straight-through gradients too

    @jax.jit
    def jacobian(x):
        def summed(x):
            out = model.apply({"params": params}, x, hypers=hypers(), keys=keys,
                              method="from_embeddings")
            return jnp.sum(jnp.sin(out.logits[0]), axis=-1)

        return jnp.abs(jax.jacrev(summed)(x)[:, 0]).sum(axis=-1)

    effect = np.asarray(jacobian(x))  # [t, s]
    assert np.all(effect[np.triu_indices(TIME, 1)] == 0.0)
    assert np.all(np.diagonal(effect) > 0.0)


@pytest.mark.parametrize("sampled", [False, *making.slow(True)])  # Gradients above are drawn and not.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_replacing_later_tokens_changes_nothing_before(controller, mode, sampled):
    run, x = runner(controller, mode, sampled), tokens()
    changed = x.at[:, 12:].set((x[:, 12:] + 1) % VOCAB)
    before, after = run(x), run(changed)
    for a, b in zip(seen(before), seen(after)):
        np.testing.assert_array_equal(a[:, :12], b[:, :12])
    assert np.any(before.logits[:, 12:] != after.logits[:, 12:])


@pytest.mark.parametrize("sampled", [True, *making.slow(False)])
def test_routes_ignore_cutting_padding_and_batching(sampled):
    run = runner("bayesian", "gated", sampled)
    x = tokens()
    whole = seen(run(x, jnp.ones((BATCH, TIME), jnp.int32)))
    cut = 9
    ids = jnp.ones((BATCH, TIME), jnp.int32)
    right = seen(run(x, ids.at[:, cut:].set(0)))
    left = seen(run(jnp.roll(x, 5, axis=1), ids.at[:, :5].set(0)))
    alone = seen(run(x[:1], ids[:1]))
    shorter = seen(run(x[:, :cut], ids[:, :cut]))
    for i, all_of_it in enumerate(whole):
        exact = all_of_it.dtype.kind in "ib"
        check = np.testing.assert_array_equal if exact else assert_close
        check(right[i][:, :cut], all_of_it[:, :cut])
        check(shorter[i], all_of_it[:, :cut])
        check(left[i][:, 5:], all_of_it[:, : TIME - 5])
        check(alone[i], all_of_it[:1])


def test_forced_dense_one_hot_is_each_mechanism_alone():
    x = jax.random.normal(jax.random.key(0), (BATCH, TIME, 16))
    layer = lambda **kw: making.layer(num_heads=2, window=4, rotary=True, **kw)  # noqa: E731
    variables = making.initial(layer(), x)

    @functools.partial(jax.jit, static_argnums=0)
    def run(module, route):
        def loss(params, x):
            out, *_ = module.apply({"params": params}, x, route=route, method="routed")
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)

    for index, name in enumerate(("full", "linear", "local")):
        route = jnp.full((BATCH, TIME), index)
        (grads, dx), out = run(layer(), route)
        (alone, dx_alone), out_alone = run(layer(controller="fixed", fixed=name), None)
        assert_close(
            (out, dx, grads["projections"]), (out_alone, dx_alone, alone["projections"])
        )


def test_hard_mode_is_the_forced_route_of_its_own_argmax():
    out = runner("bayesian", "hard", False)(tokens())
    forced = jax.jit(make(mode="soft").apply)(
        {"params": parameters("bayesian")}, tokens(), hypers=hypers(), route=out.routing.route
    )
    assert_close(out.logits, forced.logits)
    assert len(np.unique(out.routing.route)) > 1


def test_gate_limits_are_soft_and_hard():
    soft, hard, gated = (runner("bayesian", mode, False) for mode in MODES)
    assert_close(gated(tokens(), threshold=0.0).logits, soft(tokens()).logits)
    assert_close(gated(tokens(), threshold=1.0).logits, hard(tokens()).logits)
    assert distance(soft(tokens()).logits, hard(tokens()).logits) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("controller", ["bayesian", "softmax"])
def test_remat_changes_no_gradient(controller):
    params = unrolled(parameters(controller))

    def gradient(model):
        def loss(params):
            keys = jax.random.split(jax.random.key(4), BATCH)
            out = model.apply({"params": params}, tokens(), hypers=hypers(), keys=keys)
            return jnp.sum(jnp.square(out.logits))

        return jax.jit(jax.grad(loss))(params)

    plain, remat = (gradient(first_layer(controller, remat=remat)) for remat in (False, True))
    assert_close(remat, plain, 3e-5)  # The controller's gradients are sums that cancel.


def test_scanned_layers_equal_unrolled_ones():
    scanned = runner("bayesian", "soft", False)(tokens())
    plain = jax.jit(make(scan_layers=False).apply)(
        {"params": unrolled(parameters("bayesian"))}, tokens(), hypers=hypers()
    )
    assert_close(scanned.logits, plain.logits)
    np.testing.assert_array_equal(plain.routing.route, scanned.routing.route)


def test_layer_stands_in_for_self_attention():
    class User(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            return making.layer(num_heads=2, window=4)(x, deterministic=deterministic)

    x = jax.random.normal(jax.random.key(0), (BATCH, TIME, 16))
    variables = making.initial(User(), x, True)
    out, aux = jax.jit(lambda variables, x: User().apply(
        variables, x, False, rngs={"routing": jax.random.key(2)}, mutable="intermediates"
    ))(variables, x)
    assert out.shape == x.shape
    (routing,) = aux["intermediates"]["MetaAttention_0"]["routing"]
    assert routing.mean.shape == (BATCH, TIME, 3)


@pytest.mark.parametrize(
    "fields, call, sentence",
    [
        (dict(num_heads=3), {}, "num_heads: expected a positive divisor"),
        (dict(num_kv_heads=3), {}, "num_kv_heads: expected a positive divisor"),
        (dict(window=0), {}, "window: expected at least 1"),
        (dict(mode="sof"), {}, "mode: expected one of"),
        (dict(mechanisms=("full", "lokal")), {}, "got 'lokal'; did you mean 'local'"),
        (dict(mechanisms=("full", "full")), {}, "mechanisms: expected 2 or more distinct"),
        (dict(controller="fixed", fixed="lin"), {}, "fixed: expected one of"),
        (dict(controller="bayes"), {}, "controller: expected one of"),
        (dict(strength=0.0), {}, "strength: expected a finite number > 0"),
        (dict(costs=(1.0, 2.0)), {}, "costs: expected 3 positive numbers"),
        (dict(costs="analytic"), {}, "costs: expected 'nominal' or numbers"),
        (dict(window=4.5), {}, "window: expected an integer, got 4.5"),
        ({}, dict(mask=jnp.ones((1, 1, TIME, TIME))), "segment_ids"),
        ({}, dict(inputs_kv=jnp.ones((BATCH, TIME, 16))), "self-attention"),
        ({}, dict(segment_ids=jnp.ones((BATCH, 3), jnp.int32)), "segment_ids: expected shape"),
        ({}, dict(route=jnp.full((BATCH, TIME), 3)), "route: expected indices"),
    ],
)
def test_bad_input_is_one_sentence(fields, call, sentence):
    x = jnp.ones((BATCH, TIME, 16))
    with pytest.raises(ValueError, match=sentence) as error:
        layer = making.layer(**{"num_heads": 2, "window": 4, **fields})
        jax.eval_shape(lambda: layer.init(jax.random.key(0), x, **call))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields, sentence", [
    (dict(spec=8), "spec: expected an AttentionSpec, got 8"),
    (dict(router="fixed"), "router: expected a Router, got 'fixed'"),
])
def test_records_of_another_kind_are_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        MetaAttention(num_heads=2, **fields).init(jax.random.key(0), jnp.ones((1, 4, 16)))


@pytest.mark.parametrize("fields, sentence", [
    (dict(vocab_size=0), "vocab_size: expected at least 1, got 0"),
    (dict(num_layers=1.5), "num_layers: expected an integer, got 1.5"),
    (dict(attention=8), "attention: expected an AttentionSpec, got 8"),
    (dict(mlp_dim=-3), "mlp_dim: expected at least 1, got -3"),
])
def test_sizes_that_no_model_has_are_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelConfig(**dict(vocab_size=5, model_dim=16, num_layers=1, num_heads=2) | fields)


def test_a_model_of_something_else_is_one_sentence():
    with pytest.raises(ValueError, match="config: expected a ModelConfig, got 8"):
        LanguageModel(8).init(jax.random.key(0), tokens(), hypers=hypers())


def test_integers_of_numpy_are_those_of_python():
    assert making.config(
        vocab_size=np.int64(5), model_dim=16, num_layers=1, num_heads=2, window=np.int32(8)
    ) == making.config(vocab_size=5, model_dim=16, num_layers=1, num_heads=2, window=8)


@pytest.mark.slow
def test_a_numpy_false_draws_samples_as_a_python_false_does():
    x = jax.random.normal(jax.random.key(0), (2, 12, 16))
    layer = making.layer(num_heads=2, window=4)
    variables = making.initial(layer, x)
    rngs = {"routing": jax.random.key(2)}
    mean = jax.jit(layer.apply)(variables, x)
    apply = lambda flag: jax.jit(  # noqa: E731
        lambda variables, x: layer.apply(variables, x, deterministic=flag, rngs=rngs)
    )(variables, x)
    drawn = apply(False)
    assert float(jnp.abs(drawn - mean).max()) > 1e-3
    same = apply(np.bool_(False))
    np.testing.assert_array_equal(same, drawn)


@pytest.mark.slow
def test_long_hard_sequences_by_packed_dispatch_are_those_of_dense_and_of_the_cut():
    """The whole model, T above the length where packed dispatch begins, cut to one below it."""
    time, cut = 600, 350
    model = making.model(vocab_size=11, model_dim=16, num_layers=2, num_heads=2, window=9, mode="hard",
                         scan_layers=True)
    tokens = jax.random.randint(jax.random.key(0), (1, time), 0, 11)
    params = {"params": random_parameters(model)}
    run = lambda dispatch, x: jax.jit(  # noqa: E731
        functools.partial(model.clone(dispatch=dispatch).apply, params, hypers=hypers())
    )(x)
    packed, dense, short = run("auto", tokens), run("dense", tokens), run("auto", tokens[:, :cut])
    assert len(np.unique(packed.routing.route)) == 3
    np.testing.assert_array_equal(packed.routing.route, dense.routing.route)
    np.testing.assert_array_equal(packed.routing.route[:, :, :cut], short.routing.route)
    assert_close(packed.logits, dense.logits)
    assert_close(packed.logits[:, :cut], short.logits)

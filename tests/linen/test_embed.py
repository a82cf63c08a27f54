"""The Linen lookup, which takes the place of Flax's `Embed`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbag

pytestmark = pytest.mark.standard_promotion
IDS = np.array([[0, 1, 2], [2, 9, 4]], np.int32)


def init(module, *args):
    return module.init(jax.random.key(0), *(args or (IDS,)))


def test_the_public_name_is_the_linen_module():
    assert jbag.Embed is jbag.linen.Embed


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("packed", [None, True])
def test_it_takes_the_place_of_the_module_of_flax(packed, dtype, param_dtype):
    args = 10, 4, dtype, param_dtype, jax.nn.initializers.normal(1.0)
    peer, own = nn.Embed(*args), jbag.linen.Embed(*args, packed=packed)
    variables = init(peer)
    ours = init(own)
    jax.tree.map(np.testing.assert_array_equal, jbag.unpack(ours), variables)
    query = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), "bfloat16")

    def results(module, variables):
        rows = module.apply(variables, IDS)
        logits = module.apply(variables, query, method="attend")
        return (rows.astype(jnp.float32) ** 2).sum() + logits.sum(), (rows, logits)

    both = jax.value_and_grad(results, argnums=1, has_aux=True)
    found, wanted = both(own, ours), both(peer, variables)
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-2)
    jax.tree.map(same, jbag.unpack(found), wanted)
    for x, y in zip(found[0][1], wanted[0][1], strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)


def test_its_initial_table_is_that_of_flax():
    table = init(jbag.linen.Embed(1000, 64))["params"]["embedding"]
    expected = init(nn.Embed(1000, 64))["params"]["embedding"]
    np.testing.assert_array_equal(table, expected)


def test_a_table_of_one_row_is_looked_up_too():
    module = jbag.linen.Embed(1, 4)
    variables = init(module, jnp.array([0]))
    found = module.apply(variables, jnp.array([0, 1]))
    np.testing.assert_array_equal(np.isnan(found).any(1), [False, True])


def test_dtypes_are_promoted_by_the_function_given():
    calls = []

    def promote(*args, **options):
        calls.append(([x.shape for x in args], options))
        return [x.astype("float16") for x in args]

    module = jbag.linen.Embed(10, 4, promote_dtype=promote)
    variables = init(module)
    assert module.apply(variables, IDS).dtype == "float16"
    query = jnp.ones((5, 4))
    assert module.apply(variables, query, method="attend").dtype == "float16"
    rows, attended = calls[-2:]
    assert rows == ([(2, 3, 4)], {"dtype": None, "inexact": False})
    assert attended == ([(5, 4), (10, 4)], {"dtype": None})


def test_the_module_is_the_function():
    options = {"padding_idx": -1, "max_norm": 0.5, "norm_type": 1.0}
    options |= {"scale_grad_by_freq": True, "implementation": "xla", "sparse": True}
    module = jbag.linen.Embed(10, 4, **options)
    variables = init(module)
    table = variables["params"]["embedding"]
    np.testing.assert_array_equal(table[9], 0)
    bags = jbag.Bags.from_lists([[1, 2], [9]], [[1.0, 2.0], [3.0]], capacity=5)
    for ids in (IDS, 3, bags):
        loss = lambda v, ids=ids: jnp.sin(module.apply(v, ids)).sum()
        same = lambda t, ids=ids: jnp.sin(
            jbag.embedding_lookup(t, ids, **options)
        ).sum()
        value, gradient = jax.value_and_grad(loss)(variables)
        expected, expected_gradient = jax.value_and_grad(same)(table)
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(
            gradient["params"]["embedding"], expected_gradient
        )


@pytest.mark.parametrize("packed", [False, True])
def test_lookups_train_by_rows(packed):
    module = jbag.linen.Embed(10, 4, sparse=True, packed=packed)
    variables = init(module)
    optimizer = jbag.optim.sgd(0.1)
    loss = lambda variables: (module.apply(variables, IDS) ** 2).sum()
    gradient = jax.jit(jbag.grad(loss))(variables)
    rows = jbag.unpack(gradient["params"]["embedding"])
    assert isinstance(rows, jbag.RowSparse)
    updates, _ = optimizer.update(gradient, optimizer.init(variables), variables)
    moved = jbag.unpack(optax.apply_updates(variables, updates))["params"]["embedding"]
    before = np.asarray(jbag.unpack(variables)["params"]["embedding"])
    counts = np.bincount(IDS.reshape(-1), minlength=10)[:, None]
    np.testing.assert_allclose(moved, before * (1 - 0.2 * counts), rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_tied_weights_have_a_dense_gradient(packed):
    class Model(nn.Module):
        embed: nn.Module

        def __call__(self, ids):
            return self.embed.attend(jnp.sin(self.embed(ids)))

    model = Model(jbag.linen.Embed(10, 4, sparse=True, packed=packed))
    peer = Model(nn.Embed(10, 4))
    variables, theirs = init(model), init(peer)
    loss = lambda model: lambda variables: (model.apply(variables, IDS) ** 2).sum()
    with pytest.warns(jbag.DenseGradientWarning):
        found = jbag.grad(loss(model))(variables)
    quiet = jbag.grad(loss(model), allow_dense=True)(variables)
    wanted = jax.grad(loss(peer))(theirs)
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    jax.tree.map(same, jbag.unpack(found), wanted)
    jax.tree.map(same, jbag.unpack(quiet), wanted)
    with pytest.raises(ValueError, match="embedding"):
        jbag.grad(loss(model), allow_dense=False)(variables)


def test_partitioning_metadata_survives_initialization():
    boxed = nn.with_partitioning(jax.nn.initializers.normal(1.0), ("rows", None))
    module = jbag.linen.Embed(10, 4, padding_idx=2, embedding_init=boxed)
    variables = init(module)
    box = variables["params"]["embedding"]
    assert isinstance(box, nn.Partitioned)
    np.testing.assert_array_equal(box.value[2], 0)
    assert module.apply(variables, IDS).shape == (2, 3, 4)


def test_a_pretrained_table_is_frozen_or_not():
    table = jax.random.normal(jax.random.key(1), (10, 4), jnp.bfloat16)
    frozen = jbag.linen.Embed.from_pretrained(table, padding_idx=0)
    variables = init(frozen)
    assert list(variables) == ["frozen"]
    np.testing.assert_array_equal(frozen.apply(variables, IDS), table[IDS])
    logits = frozen.apply(variables, jnp.ones(4), method="attend")
    assert logits.shape == (10,)
    free = jbag.linen.Embed.from_pretrained(table, freeze=False)
    np.testing.assert_array_equal(init(free)["params"]["embedding"], table)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"padding_idx": 10}, ValueError, "`padding_idx` must be in"),
        ({"implementation": "triton"}, ValueError, "`implementation` must be None"),
        ({"num_embeddings": 0}, ValueError, "`num_embeddings` must be at least 1"),
        ({"max_norm": -1}, ValueError, "`max_norm` must be at least 0"),
        ({"dtype": "int32"}, TypeError, "`dtype` must be floating; got int32"),
        ({"sparse": 1}, TypeError, "`sparse` must be True or False"),
        ({"packed": 1}, TypeError, "`packed` must be True or False"),
    ],
)
def test_bad_options_raise_before_a_table_is_made(options, error, message):
    with pytest.raises(error, match=message):
        init(jbag.linen.Embed(**{"num_embeddings": 10, "features": 3, **options}))


def test_bad_ids_raise():
    module = jbag.linen.Embed(10, 4)
    variables = init(module)
    with pytest.raises(IndexError, match="`ids` must lie in"):
        module.apply(variables, [10])
    with pytest.raises(TypeError, match="`ids` must hold integers"):
        module.apply(variables, jnp.ones(3))

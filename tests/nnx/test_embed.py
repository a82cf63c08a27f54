"""The NNX lookup, which takes the place of Flax's `Embed`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import jbag

pytestmark = pytest.mark.standard_promotion
IDS = np.array([[0, 1, 2], [2, 9, 4]], np.int32)


def make(**options):
    return jbag.nnx.Embed(10, 4, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("packed", [None, True])
def test_it_takes_the_place_of_the_module_of_flax(packed, dtype, param_dtype):
    options = {"dtype": dtype, "param_dtype": param_dtype}
    peer = nnx.Embed(10, 4, rngs=nnx.Rngs(0), **options)
    own = make(packed=packed, **options)
    query = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), "float16")

    def results(module):
        rows, logits = module(jnp.asarray(IDS)), module.attend(query)
        return (rows.astype(jnp.float32) ** 2).sum() + logits.sum(), (rows, logits)

    both = nnx.value_and_grad(results, has_aux=True)
    ((_, found), own_gradient), ((_, wanted), gradient) = both(own), both(peer)
    for x, y in zip(found, wanted, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)
    mine = nnx.to_pure_dict(jbag.unpack(own_gradient))["embedding"]
    np.testing.assert_allclose(mine, gradient["embedding"][...], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_lookups_train_by_rows(packed):
    module = make(sparse=True, packed=packed)
    before = np.array(module(np.arange(10)))
    optimizer = nnx.Optimizer(module, jbag.optim.sgd(0.1), wrt=nnx.Param)
    gradient = jbag.grad(lambda module: (module(IDS) ** 2).sum())(module)
    (rows,) = jax.tree.leaves(gradient, is_leaf=lambda x: isinstance(x, jbag.RowSparse))
    assert isinstance(rows, jbag.RowSparse)
    optimizer.update(module, gradient)
    counts = np.bincount(IDS.reshape(-1), minlength=10)[:, None]
    expected = before * (1 - 0.2 * counts)
    np.testing.assert_allclose(module(np.arange(10)), expected, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_tied_weights_have_a_dense_gradient(packed):
    module, peer = make(sparse=True, packed=packed), nnx.Embed(10, 4, rngs=nnx.Rngs(0))

    def loss(module):
        return (module.attend(jnp.sin(module(jnp.asarray(IDS)))) ** 2).sum()

    with pytest.warns(jbag.DenseGradientWarning):
        found = jbag.grad(loss)(module)
    wanted = nnx.grad(loss)(peer)
    mine = nnx.to_pure_dict(jbag.unpack(found))["embedding"]
    np.testing.assert_allclose(mine, wanted["embedding"][...], rtol=1e-5, atol=1e-5)
    optimizer = nnx.Optimizer(module, optax.adam(0.1), wrt=nnx.Param)
    optimizer.update(module, jbag.grad(loss, allow_dense=True)(module))


def test_results_lie_as_they_should_on_a_mesh():
    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        module = make()
        ids = jax.device_put(np.zeros((8, 3), np.int32), P("x"))
        assert jax.typeof(module(ids)).sharding.spec == P("x", None, None)
        rows = module(ids, out_sharding=P(None, None, "x"))
        assert jax.typeof(rows).sharding.spec == P(None, None, "x")
        logits = module.attend(jnp.ones((8, 4)), out_sharding=P("x", None))
        assert jax.typeof(logits).sharding.spec == P("x", None)


def test_metadata_and_a_frozen_table():
    module = make(embedding_metadata={"note": "mine"}, padding_idx=2)
    assert module.embedding.get_metadata()["note"] == "mine"
    np.testing.assert_array_equal(module(2), 0)
    table = jax.random.normal(jax.random.key(1), (10, 3), jnp.bfloat16)
    frozen = jbag.nnx.Embed.from_pretrained(table, padding_idx=0)
    assert isinstance(frozen.embedding, jbag.nnx.Frozen)
    np.testing.assert_array_equal(frozen(IDS), table[IDS])
    free = jbag.nnx.Embed.from_pretrained(table, freeze=False)
    assert isinstance(free.embedding, nnx.Param)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"padding_idx": 10}, ValueError, "`padding_idx` must be in"),
        ({"implementation": "triton"}, ValueError, "`implementation` must be None"),
        ({"max_norm": -1}, ValueError, "`max_norm` must be at least 0"),
        ({"scale_grad_by_freq": 3}, TypeError, "`scale_grad_by_freq` must be True"),
    ],
)
def test_bad_options_raise_before_a_table_is_made(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)

"""The NNX module: variables, options, metadata, and training with Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jbag

pytestmark = pytest.mark.standard_promotion
BAGS = jbag.Bags.from_lists([[0, 1, 2, 3], [4, 5], [6, 0, 7, 8]])


def make(*args, **options):
    return jbag.nnx.EmbeddingBag(*(args or (10, 3)), rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn", "max", "min"])
def test_the_module_is_the_function(mode):
    options = {"mode": mode, "padding_idx": -1, "max_norm": 0.5, "norm_type": 1.0}
    options |= {"scale_grad_by_freq": True, "implementation": "xla", "sparse": True}
    bag = make(**options)
    loss = lambda m: jnp.sin(m(BAGS)).sum()
    same = lambda t: jnp.sin(jbag.embedding_bag(t, BAGS, **options)).sum()
    value, gradient = nnx.value_and_grad(loss)(bag)
    expected, expected_gradient = jax.value_and_grad(same)(bag.embedding[...])
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient.embedding[...], expected_gradient)


def test_a_packed_module_trains_as_one_of_arrays():
    class Model(nnx.Module):
        def __init__(self, packed):
            self.bag = make(sparse=True, packed=packed)
            self.head = nnx.Linear(3, 1, rngs=nnx.Rngs(1))

        def __call__(self, bags):
            return self.head(self.bag(bags))

    def loss(model):
        return (model(BAGS) ** 2).sum()

    results = []
    for packed in (False, True):
        model = Model(packed)
        rules = {"bag": jbag.optim.rowwise_adagrad(0.1), "head": optax.adam(0.1)}
        labels = nnx.State({"bag": "bag", "head": "head"})
        optimizer = nnx.Optimizer(model, optax.partition(rules, labels), wrt=nnx.Param)
        graph, state = nnx.split((model, optimizer))

        @jax.jit
        def step(state, graph=graph):
            model, optimizer = nnx.merge(graph, state)
            value, gradient = jbag.value_and_grad(loss)(model)
            optimizer.update(model, gradient)
            return nnx.state((model, optimizer)), value

        for _ in range(3):
            state, value = step(state)
        assert step._cache_size() == 1
        results.append((nnx.to_pure_dict(jbag.unpack(state)), value))
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, results[1], results[0])
    # A checkpoint of the arrays, restored where they are packed.
    unpacked = jbag.unpack(state)
    nnx.replace_by_pure_dict(unpacked, results[0][0])
    restored = jbag.pack_like(unpacked, like=state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(close, restored, state)


def test_dense_gradients_of_a_packed_module_train_it():
    results = []
    for packed in (False, True):
        model = make(packed=packed)
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        for _ in range(2):
            gradient = nnx.grad(lambda model: (model(BAGS) ** 2).sum())(model)
            optimizer.update(model, gradient)
        results.append(nnx.to_pure_dict(jbag.unpack(nnx.state(model))))
    jax.tree.map(np.testing.assert_allclose, *results)
    torch = pytest.importorskip("torch")
    table = torch.tensor(np.array(results[1]["embedding"]))
    torch.testing.assert_close(model.to_torch().weight, table, check_stride=False)


def test_every_form_of_bags_is_taken():
    ids = [0, 1, 2, 3, 4, 5, 6, 0, 7, 8]
    expected = make()(BAGS)
    np.testing.assert_array_equal(make()(ids, [0, 4, 6]), expected)
    last = make(include_last_offset=True)
    np.testing.assert_array_equal(last(ids, [0, 4, 6, 10]), expected)
    assert make()([[1, 2]], weights=[[1.0, 3.0]]).shape == (1, 3)


def test_the_default_initialiser_is_that_of_flax():
    embed = nnx.Embed(1000, 64, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(make(1000, 64).embedding[...], embed.embedding[...])


@pytest.mark.parametrize("padding_idx", [3, -7])
def test_the_padding_row_starts_as_zeros(padding_idx):
    table = make(10, 4, padding_idx=padding_idx).embedding[...]
    np.testing.assert_array_equal(table[3], 0)
    assert (np.delete(table, 3, axis=0) != 0).all()


def test_dtype_is_of_the_result_and_param_dtype_of_the_table():
    bag = make(dtype=jnp.float32, param_dtype=jnp.bfloat16)
    assert bag.embedding[...].dtype == jnp.bfloat16
    assert bag(BAGS).dtype == jnp.float32
    assert make(param_dtype=jnp.float16)(BAGS).dtype == jnp.float16


def test_metadata_comes_both_ways():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    boxed = nnx.with_partitioning(jax.nn.initializers.normal(1.0), ("x", None))
    with jax.set_mesh(mesh):
        for bag in (
            make(padding_idx=2, embedding_init=boxed),
            make(padding_idx=2, embedding_metadata={"out_sharding": ("x", None)}),
        ):
            assert bag.embedding.get_metadata()["out_sharding"] == ("x", None)
            np.testing.assert_array_equal(bag.embedding[...][2], 0)
            assert bag(BAGS).shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "average"}, ValueError, "`mode` must be one of"),
        ({"padding_idx": 10}, ValueError, "`padding_idx` must be in"),
        ({"implementation": "triton"}, ValueError, "`implementation` must be None"),
        ({"max_norm": -1}, ValueError, "`max_norm` must be at least 0"),
        ({"include_last_offset": 3}, TypeError, "`include_last_offset` must be True"),
    ],
)
def test_bad_options_raise_before_a_table_is_made(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_a_pretrained_table_is_frozen_or_not():
    table = jax.random.normal(jax.random.key(1), (10, 3), jnp.bfloat16)
    frozen = jbag.nnx.EmbeddingBag.from_pretrained(table, mode="sum", padding_idx=0)
    assert isinstance(frozen.embedding, jbag.nnx.Frozen)
    assert not jax.tree.leaves(nnx.state(frozen, nnx.Param))
    np.testing.assert_array_equal(frozen.embedding[...], table)
    expected = jbag.embedding_bag(table, BAGS, mode="sum", padding_idx=0)
    np.testing.assert_array_equal(frozen(BAGS), expected)
    free = jbag.nnx.EmbeddingBag.from_pretrained(table, freeze=False)
    assert isinstance(free.embedding, nnx.Param)


class Classifier(nnx.Module):
    def __init__(self, bag, rngs):
        self.bag = bag
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, bags):
        return self.head(self.bag(bags))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_classifier_trains_with_an_optimizer(frozen):
    bag = make(10, 8)
    if frozen:
        bag = jbag.nnx.EmbeddingBag.from_pretrained(bag.embedding[...])
    before = np.array(bag.embedding[...])
    model = Classifier(bag, nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
    labels = jnp.array([0, 1, 0])

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(BAGS)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
    assert np.array_equal(before, model.bag.embedding[...]) == frozen

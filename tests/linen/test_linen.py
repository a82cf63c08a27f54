"""The Linen module: parameters, options, metadata, and training with Optax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jbag

pytestmark = pytest.mark.standard_promotion
BAGS = jbag.Bags.from_lists([[0, 1, 2, 3], [4, 5], [6, 0, 7, 8]])


def init(bag, *args):
    return bag.init(jax.random.key(0), *(args or (BAGS,)))


def test_the_public_name_is_the_linen_module():
    assert jbag.EmbeddingBag is jbag.linen.EmbeddingBag


def test_the_parameter_is_named_embedding():
    variables = init(jbag.EmbeddingBag(10, 3))
    assert jax.tree.map(jnp.shape, variables) == {"params": {"embedding": (10, 3)}}


@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn", "max", "min"])
def test_the_module_is_the_function(mode):
    options = {"mode": mode, "padding_idx": -1, "max_norm": 0.5, "norm_type": 1.0}
    options |= {"scale_grad_by_freq": True, "implementation": "xla", "sparse": True}
    bag = jbag.EmbeddingBag(10, 3, **options)
    variables = init(bag)
    table = variables["params"]["embedding"]
    loss = lambda v: jnp.sin(bag.apply(v, BAGS)).sum()
    same = lambda t: jnp.sin(jbag.embedding_bag(t, BAGS, **options)).sum()
    value, gradient = jax.value_and_grad(loss)(variables)
    expected, expected_gradient = jax.value_and_grad(same)(table)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient["params"]["embedding"], expected_gradient)


def test_every_form_of_bags_is_taken():
    ids = [0, 1, 2, 3, 4, 5, 6, 0, 7, 8]
    bag = jbag.EmbeddingBag(10, 3)
    variables = init(bag, ids, [0, 4, 6])
    expected = bag.apply(variables, BAGS)
    np.testing.assert_array_equal(bag.apply(variables, ids, [0, 4, 6]), expected)
    last = jbag.EmbeddingBag(10, 3, include_last_offset=True)
    for args in ((ids, [0, 4, 6, 10]), (BAGS,)):
        np.testing.assert_array_equal(last.apply(variables, *args), expected)
    weighted = bag.apply(variables, [[1, 2]], weights=[[1.0, 3.0]])
    table = variables["params"]["embedding"]
    np.testing.assert_allclose(weighted[0], (table[1] + 3 * table[2]) / 4, rtol=1e-6)


def test_the_default_initialiser_is_that_of_flax():
    # At one parameter path, so that a model can change from one to the other.
    table = init(jbag.EmbeddingBag(1000, 64))["params"]["embedding"]
    embed = nn.Embed(1000, 64).init(jax.random.key(0), jnp.array([0]))
    np.testing.assert_array_equal(table, embed["params"]["embedding"])
    assert abs(float(table.std()) * 8 - 1) < 0.02


@pytest.mark.parametrize("padding_idx", [3, -7])
def test_the_padding_row_starts_as_zeros(padding_idx):
    table = init(jbag.EmbeddingBag(10, 4, padding_idx=padding_idx))["params"][
        "embedding"
    ]
    np.testing.assert_array_equal(table[3], 0)
    assert (np.delete(table, 3, axis=0) != 0).all()


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_dtype_is_of_the_result_and_param_dtype_of_the_table(dtype, param_dtype):
    bag = jbag.EmbeddingBag(10, 3, dtype=dtype, param_dtype=param_dtype)
    variables = init(bag)
    assert variables["params"]["embedding"].dtype == param_dtype
    assert bag.apply(variables, BAGS).dtype == (dtype or param_dtype)


def test_partitioning_metadata_survives_initialisation():
    normal = jax.nn.initializers.normal(1.0)
    boxed = nn.with_partitioning(normal, ("rows", None))
    bag = jbag.EmbeddingBag(10, 3, padding_idx=2, embedding_init=boxed)
    variables = init(bag)
    box = variables["params"]["embedding"]
    assert isinstance(box, nn.Partitioned)
    assert box.names == ("rows", None)
    np.testing.assert_array_equal(box.value[2], 0)
    spec = nn.get_partition_spec(variables)["params"]["embedding"]
    assert spec == jax.sharding.PartitionSpec("rows", None)
    assert bag.apply(nn.unbox(variables), BAGS).shape == (3, 3)
    assert bag.apply(variables, BAGS).shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "average"}, ValueError, "`mode` must be one of"),
        ({"padding_idx": 10}, ValueError, "`padding_idx` must be in"),
        ({"implementation": "triton"}, ValueError, "`implementation` must be None"),
        ({"num_embeddings": 0}, ValueError, "`num_embeddings` must be at least 1"),
        ({"max_norm": -1}, ValueError, "`max_norm` must be at least 0"),
        ({"norm_type": "2"}, TypeError, "`norm_type` must be a number"),
        ({"dtype": "int32"}, TypeError, "`dtype` must be floating; got int32"),
        ({"sparse": 1}, TypeError, "`sparse` must be True or False"),
        ({"features": 1.5}, TypeError, "`features` must be an integer"),
    ],
)
def test_bad_options_raise_before_a_table_is_made(options, error, message):
    with pytest.raises(error, match=message):
        init(jbag.EmbeddingBag(**{"num_embeddings": 10, "features": 3, **options}))


def test_a_pretrained_table_is_frozen_or_not():
    table = jax.random.normal(jax.random.key(1), (10, 3), jnp.bfloat16)
    frozen = jbag.EmbeddingBag.from_pretrained(table, mode="sum", padding_idx=0)
    variables = init(frozen)
    assert list(variables) == ["frozen"]
    np.testing.assert_array_equal(variables["frozen"]["embedding"], table)
    expected = jbag.embedding_bag(table, BAGS, mode="sum", padding_idx=0)
    np.testing.assert_array_equal(frozen.apply(variables, BAGS), expected)
    free = jbag.EmbeddingBag.from_pretrained(table, freeze=False)
    np.testing.assert_array_equal(init(free)["params"]["embedding"], table)
    donated = jax.jit(lambda v: v, donate_argnums=0)(init(free))
    del donated
    assert not table.is_deleted()
    with pytest.raises(TypeError, match="`embedding_init` must not be given"):
        jbag.EmbeddingBag.from_pretrained(table, embedding_init=jnp.zeros)
    with pytest.raises(TypeError, match="`table` must be a matrix"):
        jbag.EmbeddingBag.from_pretrained(jnp.ones((3, 3), int))


class Classifier(nn.Module):
    bag: nn.Module

    @nn.compact
    def __call__(self, bags):
        return nn.Dense(2)(self.bag(bags))


def train(model, steps=30):
    labels = jnp.array([0, 1, 0])
    variables = init(model)
    rest = {k: v for k, v in variables.items() if k != "params"}
    state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.adamw(0.1)
    )

    @jax.jit
    def step(state):
        def loss(params):
            logits = state.apply_fn({"params": params, **rest}, BAGS)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    losses = []
    for _ in range(steps):
        state, value = step(state)
        losses.append(float(value))
    return state, rest, losses


def test_a_classifier_trains_with_a_train_state():
    state, _, losses = train(Classifier(jbag.EmbeddingBag(10, 8)))
    assert losses[-1] < 0.1 < losses[0]
    assert state.params["bag"]["embedding"].shape == (10, 8)


def test_a_frozen_table_is_untouched_by_weight_decay():
    table = jax.random.normal(jax.random.key(1), (10, 8))
    state, rest, losses = train(Classifier(jbag.EmbeddingBag.from_pretrained(table)))
    assert losses[-1] < losses[0]
    assert "bag" not in state.params
    np.testing.assert_array_equal(rest["frozen"]["bag"]["embedding"], table)


def test_flax_transformations_lift_the_module():
    class Towers(nn.Module):
        @nn.compact
        def __call__(self, bags):
            lifted = nn.vmap(
                jbag.EmbeddingBag,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
            )
            return lifted(10, 4, name="towers")(bags)

    model = Towers()
    variables = init(model)
    assert variables["params"]["towers"]["embedding"].shape == (3, 10, 4)
    out = model.apply(variables, BAGS)
    table = variables["params"]["towers"]["embedding"][1]
    np.testing.assert_allclose(out[1], jbag.embedding_bag(table, BAGS), rtol=1e-6)

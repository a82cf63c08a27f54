"""Row-wise optimizers against the formulas, PyTorch, and Optax on dense gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer_oracle as formulas
import oracle
import pytest
from jax import export
from slow import slow

import jbag
from jbag import optim

V, D = 12, 3
PADDING = 4
# Of the flat slots: bags of three, none, six, and two of padding; then three in no bag.
OFFSETS = np.array([0, 3, 3, 9, 11], np.int32)
DENSE = {"bias": (D,), "scalar": (), "kernel": (2, D)}


def decreasing(count):
    return 0.3 / (1 + count.astype(float))


DECAY = {"weight_decay": 0.1}
VELOCITY = {"momentum": 0.9, "dampening": 0.3}
ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}
FTRL = {"l1": 0.2, "l2": 0.1, "beta": 0.5}
MOMENTS = {"mu": 0.0, "nu": 0.0}
from_more = functools.partial(optim.rowwise_adagrad, initial_accumulator_value=0.2)
# By name: the optimizer, its formula, what that keeps and starts from, its numbers.
CASES = {
    "sgd": (optim.sgd, formulas.sgd, {}, {}),
    "momentum": (optim.sgd, formulas.momentum, {"trace": 0.0}, VELOCITY | DECAY),
    "nesterov": (
        optim.sgd,
        formulas.momentum,
        {"trace": 0.0},
        VELOCITY | {"nesterov": True},
    ),
    "adagrad": (
        optim.adagrad,
        formulas.adagrad,
        {"sum_of_squares": 0.0},
        DECAY | {"eps": 1e-3},
    ),
    "rowwise_adagrad": (
        from_more,
        formulas.rowwise_adagrad,
        {"sum_of_squares": 0.2},
        {"eps": 1e-8},
    ),
    "adam": (optim.adam, formulas.adam, MOMENTS, ADAM | DECAY),
    "rowwise_adam": (optim.rowwise_adam, formulas.rowwise_adam, MOMENTS, ADAM),
    "rowwise_rmsprop": (
        optim.rowwise_adam,
        formulas.rowwise_adam,
        {"nu": 0.0},
        ADAM | DECAY | {"b1": 0},
    ),
    "ftrl": (optim.ftrl, formulas.ftrl, {"z": 0.0, "n": 0.1}, FTRL),
}


def make(case):
    make_optimizer, _, _, numbers = CASES[case]
    return make_optimizer(decreasing, **numbers)


@pytest.fixture
def default_promotion():
    """Optax relies on JAX's default promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def start(dtype="float32"):
    """Return a table and dense parameters."""
    rng = np.random.default_rng(0)
    shapes = {"table": (V, D), **DENSE}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def draw(rng, scale, *shape):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def batch(step, dtype="float32"):
    """Return what two pools and the dense parameters are given in a step."""
    rng = np.random.default_rng(step)
    some = np.delete(np.arange(9), PADDING)  # 9 and up are in no bag
    flat = np.r_[rng.choice(some, 9), PADDING, PADDING, 10, 10, 11]
    flat[:3], flat[3] = flat[0], PADDING
    flat[4:6] = -1, V
    padded = rng.choice(some, (2, 3))
    padded[0, 0], padded[1, :2] = V + 5, padded[1, 2]
    normal = lambda *shape: draw(rng, 1, *shape).astype(dtype)
    weights = jnp.asarray(rng.uniform(0.5, 1.5, size=14), dtype)
    cotangents = (normal(4, D), normal(2, D))
    dense = {name: normal(*shape) for name, shape in DENSE.items()}
    ids = jnp.asarray(flat, jnp.int32), jnp.asarray(padded, jnp.int32)
    return *ids, weights, cotangents, dense


def loss(params, batch, implementation=None):
    """Pool twice, of which one bag has ids that are no rows; be linear in the rest."""
    flat, padded, weights, cotangents, dense = batch
    pool = functools.partial(
        jbag.embedding_bag, params["table"], sparse=True, implementation=implementation
    )
    bags = jbag.Bags(flat, jnp.asarray(OFFSETS), weights)
    pooled = (pool(bags, mode="sum", padding_idx=PADDING), pool(padded))
    products = [a * g for a, g in zip(pooled, cotangents, strict=True)]
    return sum(x.sum() for x in products + [params[k] * g for k, g in dense.items()])


def table_gradient(batch):
    """Return the gradient of the table, and the rows that the batch names."""
    flat, padded, weights, cotangents, _ = jax.tree.map(np.asarray, batch)
    table = np.zeros((V, D))  # sums and means are linear
    pools = [
        (oracle.slices(flat, OFFSETS, weights), cotangents[0], "sum", PADDING),
        ([[(i, None) for i in bag] for bag in padded], cotangents[1], "mean", None),
    ]
    total = sum(
        oracle.gradients(table, bags, g, mode, padding_idx)[0]
        for bags, g, mode, padding_idx in pools
    )
    named = {i for bags, *_ in pools for bag in bags for i, _ in bag}
    return total, sorted(i for i in named - {PADDING} if 0 <= i < V)


gradient_of = jax.jit(jbag.grad(loss), static_argnums=2)


def make_step(optimizer):
    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


def rows_of(array):
    """Return the array as rows: a vector, and a number, is one."""
    array = np.asarray(array, np.float64)
    return array.reshape(-1, array.shape[-1] if array.ndim else 1).copy()


def follow(case, implementation, dtype="float32", steps=5):
    """Take steps with the optimizer and with its formula; return the last state."""
    _, rule, keeps, numbers = CASES[case]
    optimizer, params = make(case), start(dtype)
    expected = {name: rows_of(x) for name, x in params.items()}
    kept = {}
    for name, w in expected.items():
        kept[name] = {k: np.full_like(w, x) for k, x in keeps.items()}
        if rule is formulas.ftrl:
            kept[name] = formulas.ftrl_start(w, 0.3, keeps["n"], **numbers)
        elif "rowwise" in case:  # the last is one number a row
            last = list(keeps)[-1]
            kept[name][last] = kept[name][last][:, 0]
    state = jax.jit(optimizer.init)(params)
    step = make_step(optimizer)
    for t in range(1, steps + 1):
        before = jax.tree.map(np.array, (params["table"], state.states))
        gradients = batch(t, dtype)
        gradient = gradient_of(params, gradients, implementation)
        params, state = step(gradient, state, params)
        table, named = table_gradient(gradients)
        for name, w in expected.items():
            rows, g = named, table
            if name != "table":
                rows, g = list(range(len(w))), rows_of(gradients[-1][name])
            move = functools.partial(formulas.move, rule, w, kept[name], rows, g)
            move(0.3 / t, t, **numbers)
            oracle.assert_close(rows_of(params[name]), w, dtype)
            for key, x in kept[name].items():
                got = np.asarray(state.states[key][name]).reshape(x.shape)
                oracle.assert_close(got, x, dtype)
        after = (params["table"], state.states)
        others = np.setdiff1d(np.arange(V), named)
        for a, b in [
            (after[0], before[0]),
            *((after[1][k]["table"], before[1][k]["table"]) for k in keeps),
        ]:
            np.testing.assert_array_equal(a[others], b[others])
    assert state.count == steps
    return params, state


@pytest.mark.parametrize("case", CASES)
def test_each_step_follows_the_formula_on_named_rows_alone(case, implementation):
    follow(case, implementation)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("rowwise_adagrad", "bfloat16"),
        *slow(("adam", "float64"), ("nesterov", "float16")),
    ],
)
def test_other_dtypes_follow_it_with_states_in_32_bits_at_least(
    case, dtype, implementation
):
    wide = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64(dtype == "float64"):
        # Of 16 bits, each step rounds: few steps keep within one rounding's tolerance.
        params, state = follow(case, implementation, dtype, steps=2)
        assert {x.dtype for x in params.values()} == {jnp.dtype(dtype)}
        assert {x.dtype for x in jax.tree.leaves(state.states)} == {jnp.dtype(wide)}


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (optim.sgd(0.3), "SGD", {"lr": 0.3}),
        (optim.adagrad(decreasing), "Adagrad", {"lr": 0.3, "lr_decay": 1.0}),
        (optim.adam(0.3, 0.8, 0.9), "SparseAdam", {"lr": 0.3, "betas": (0.8, 0.9)}),
    ],
)
def test_each_step_equals_pytorch_with_sparse_gradients(ours, theirs, options):
    torch = pytest.importorskip("torch")
    torch.sparse.check_sparse_tensor_invariants.disable()  # or it warns to be asked
    table = start()["table"]
    peer = torch.nn.EmbeddingBag(V, D, sparse=True, padding_idx=PADDING)
    peer.weight.data = torch.tensor(np.array(table))
    optimizer = getattr(torch.optim, theirs)(peer.parameters(), **options)
    state, step = ours.init(table), make_step(ours)
    for ids in np.random.default_rng(0).integers(0, 9, (5, 4, 6)):
        optimizer.zero_grad()
        (peer(torch.tensor(ids)) ** 2).sum().backward()
        optimizer.step()
        gradient = squares_gradient(table, jnp.asarray(ids))
        table, state = step(gradient, state, table)
        oracle.assert_close(table, peer.weight.detach().numpy())


@functools.partial(jax.jit, static_argnums=2)
@jbag.grad
def squares_gradient(table, ids, implementation=None):
    options = {"padding_idx": PADDING, "sparse": True, "implementation": implementation}
    return (jbag.embedding_bag(table, ids, **options) ** 2).sum()


@pytest.mark.parametrize(
    "case",
    [
        *(LOWERED := ["rowwise_adagrad", "adam"]),
        *slow(*(case for case in CASES if case not in LOWERED)),
    ],
)
def test_a_step_is_lowered_for_every_platform(case):
    optimizer = make(case)

    def loss(table, ids):
        options = {"padding_idx": PADDING, "sparse": True}
        modes = "mean", "max"  # which differ in how rows' gradients are made
        pooled = [jbag.embedding_bag(table, ids, mode=m, **options) for m in modes]
        return sum((x**2).sum() for x in pooled)

    @jax.jit
    def step(table, state, ids):
        updates, state = optimizer.update(jbag.grad(loss)(table, ids), state, table)
        return optax.apply_updates(table, updates), state

    table = start()["table"]
    args = table, optimizer.init(table), jnp.arange(24, dtype=jnp.int32).reshape(6, 4)
    exported = export.export(step, platforms=("cpu", "cuda", "tpu"))(*args)
    assert "custom_call @jbag" not in exported.mlir_module()
    if jax.default_backend() in exported.platforms:
        close = functools.partial(oracle.assert_close, dtype="float32")
        jax.tree.map(close, exported.call(*args), step(*args))


def labels(params):
    return {k: "tables" if k == "table" else "rest" for k in params}


ROOTS = {"initial_accumulator_value": 0.1, "eps": 0.0}
# By name: made of ours and made of Optax's, and whether every row must be named.
PEERS = {
    "nesterov": (lambda x: x.sgd(0.1, 0.9, nesterov=True), True),
    "adamw": (
        lambda x: getattr(x, "adamw", optim.adam)(decreasing, eps=0, weight_decay=0.1),
        True,
    ),
    "clipped": (lambda x: optax.chain(x.clip_by_global_norm(0.5), x.sgd(0.1)), False),
    "decay first": (
        lambda x: optax.chain(x.add_decayed_weights(0.5), x.sgd(0.1, 0.9)),
        True,
    ),
    "decay last": (
        lambda x: optax.chain(x.sgd(0.1), x.add_decayed_weights(0.1)),
        True,
    ),
    "partition": (
        lambda x: optax.partition(
            {"tables": x.adagrad(0.1, **ROOTS), "rest": optax.adam(0.1)}, labels
        ),
        False,
    ),
    "injected": (
        lambda x: optax.inject_hyperparams(x.adagrad)(decreasing, **ROOTS),
        False,
    ),
}


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("case", PEERS)
def test_each_step_equals_optax_with_dense_gradients(case):
    build, every_row = PEERS[case]
    ours, theirs = build(optim), build(optax)

    @jax.jit
    def step(trees, states, gradient):
        dense = gradient | {"table": gradient["table"].todense()}
        updates, state = ours.update(gradient, states[0], trees[0])
        peers, other = theirs.update(dense, states[1], trees[1])
        moved = optax.apply_updates(trees[0], updates)
        return (moved, optax.apply_updates(trees[1], peers)), (state, other)

    trees = (start(), start())
    states = (ours.init(trees[0]), theirs.init(trees[1]))
    rng = np.random.default_rng(0)
    for scale in (1, 1, 0.01, 1):  # the third isn't clipped
        normal = functools.partial(draw, rng, scale)
        ids = np.r_[np.arange(V) if every_row else [2, 5, 7], rng.integers(0, 9, 5)]
        gradient = {name: normal(*shape) for name, shape in DENSE.items()}
        gradient["table"] = jbag.RowSparse.from_rows(ids, normal(ids.size, D), V)
        trees, states = step(trees, states, gradient)
        jax.tree.map(oracle.assert_close, *trees)


def test_norms_are_of_rows_whose_duplicates_are_summed(implementation):
    gradient = gradient_of(start(), batch(0), implementation)
    table, _ = table_gradient(batch(0))
    every = [table, *(np.asarray(x, np.float64) for x in batch(0)[-1].values())]
    norm = np.sqrt(sum((x**2).sum() for x in every))
    oracle.assert_close(jax.jit(optim.global_norm)(gradient), norm)
    clip = optim.clip_by_row_norm(0.7)
    clipped, _ = jax.jit(clip.update)(gradient, clip.init(None))
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    assert (norms > 0.7).any()
    assert (norms[norms > 0] < 0.7).any()
    scaled = table * np.minimum(1, 0.7 / np.maximum(norms, 1e-9))
    oracle.assert_close(clipped["table"].todense(), scaled)
    np.testing.assert_array_equal(clipped["kernel"], gradient["kernel"])
    assert optim.global_norm({}) == 0


def squares(params, ids):
    pooled = jbag.embedding_bag(params["table"], ids, sparse=True)
    return ((pooled + params["bias"]) ** 2).sum()


@pytest.mark.parametrize(("dtype", "seed"), [("float32", None), ("bfloat16", 0)])
def test_an_update_is_what_is_added(dtype, seed):
    optimizer = optim.adam(0.1, weight_decay=0.1, stochastic_rounding=seed)

    @jax.jit
    def step(gradient, state, params, others):
        updates, _ = optimizer.update(gradient, state, params)
        moved = optax.apply_updates(params, updates)
        return updates, moved, optax.apply_updates(others, updates)

    @jax.jit
    def outside(updates, others):
        change = updates | {"table": updates["table"].todense()}
        again = optax.apply_updates(others, change | {"table": 2 * updates["table"]})
        return change, again["table"]

    params, gradients = start(dtype), batch(0, dtype)
    others = jax.tree.map(lambda x: -x, params)
    gradient = gradient_of(params, gradients)
    updates, *moved = step(gradient, optimizer.init(params), params, others)
    assert isinstance(updates["table"], jbag.RowSparse)
    # Outside of the compiled step, too, and scaled.
    change, again = outside(updates, others)
    add = lambda x, y: np.asarray(x) + np.asarray(y)
    jax.tree.map(oracle.assert_close, moved[0], jax.tree.map(add, params, change))
    jax.tree.map(oracle.assert_close, moved[1], jax.tree.map(add, others, change))
    oracle.assert_close(again, add(others["table"], 2 * change["table"]))


@pytest.mark.parametrize("shape", [(3, 0), (2, 2)])
def test_a_batch_that_names_no_row_moves_none(shape, implementation):
    optimizer, table = make("adam"), start()["table"]
    gradient = squares_gradient(table, jnp.full(shape, PADDING), implementation)
    updates, state = jax.jit(optimizer.update)(gradient, optimizer.init(table), table)
    np.testing.assert_array_equal(table + updates, table)
    np.testing.assert_array_equal(state.states["nu"], 0)
    assert state.count == 1


def test_rules_that_need_no_parameters_do_without():
    optimizer = make("rowwise_adam")
    gradient, state = gradient_of(start(), batch(0)), optimizer.init(start())
    both = jax.jit(lambda *args: (optimizer.update(*args), optimizer.update(*args[:2])))
    (updates, _), (without, _) = both(gradient, state, start())
    oracle.assert_close(without["table"].todense(), updates["table"].todense())
    oracle.assert_close(without["kernel"], updates["kernel"])


@pytest.mark.parametrize(
    "optimizer", [make("adam"), make("ftrl"), optim.add_decayed_weights(0.1)]
)
def test_rules_that_need_parameters_ask_for_them(optimizer):
    gradient = gradient_of(start(), batch(0))
    with pytest.raises(ValueError, match="`params` must be given"):
        optimizer.update(gradient, optimizer.init(start()))


def linear(params, ids):
    # What it gives the table doesn't depend on what is pooled.
    pooled = jbag.embedding_bag(params["table"], ids, sparse=True)
    return (pooled + params["bias"]).sum()


@pytest.mark.parametrize(
    ("case", "loss"), [("rowwise_adagrad", squares), ("adam", linear), ("sgd", linear)]
)
def test_a_donated_table_moves_in_place(case, loss, require):
    require("cpu")
    size = 4 * 200_000 * 16
    params = {
        "table": jax.ShapeDtypeStruct((200_000, 16), jnp.float32),
        "bias": jax.ShapeDtypeStruct((16,), jnp.float32),
    }
    optimizer = make(case)

    def step(params, state, ids):
        gradient = jbag.grad(loss)(params, ids)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    shapes = (params, jax.eval_shape(optimizer.init, params))
    ids = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*shapes, ids).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < size / 20
    assert memory.alias_size_in_bytes >= size
    program = compiled.as_text().splitlines()
    assert not [x for x in program if "[200000,16]" in x and " copy(" in x]


@pytest.mark.parametrize(
    ("function", "args", "options", "message"),
    [
        (optim.sgd, (0.1, -1), {}, "`momentum` must be at least 0; got -1"),
        (optim.sgd, (0.1, 0.9), {"dampening": 2}, "`dampening` must be at most 1"),
        (optim.sgd, (0.1,), {"weight_decay": -1}, "`weight_decay` must be at least 0"),
        (optim.adagrad, (0.1,), {"eps": -1}, "`eps` must be at least 0"),
        (
            optim.ftrl,
            (0.1,),
            {"initial_accumulator_value": -1},
            "`initial_accumulator_value` must be at least 0",
        ),
        (optim.adam, (0.1,), {"b1": -1}, "`b1` must be at least 0"),
        (optim.adam, (0.1,), {"b1": 1}, "`b1` must be below 1; got 1"),
        (optim.rowwise_adam, (0.1,), {"b2": np.nan}, "`b2` must be at least 0"),
        (optim.ftrl, (0.1,), {"l1": -1}, "`l1` must be at least 0"),
        (optim.clip_by_row_norm, (-1,), {}, "`max_norm` must be at least 0"),
        (optim.clip_by_global_norm, (-1,), {}, "`max_norm` must be at least 0"),
        (optim.add_decayed_weights, (-1,), {}, "`weight_decay` must be at least 0"),
        (optim.accumulate_gradients, (squares, 0), {}, "`steps` must be at least 1"),
    ],
)
def test_bad_arguments_are_named(function, args, options, message):
    with pytest.raises(ValueError, match=message):
        function(*args, **options)


def test_numbers_must_be_numbers():
    with pytest.raises(TypeError, match="`stochastic_rounding` must be an integer"):
        optim.adam(0.1, stochastic_rounding=0.5)
    for wrong in ("0.1", None, True):
        with pytest.raises(TypeError, match="`learning_rate` must be a number"):
            optim.adam(wrong)
    with pytest.raises(ValueError, match="`eps` must be at least 0"):
        optim.adam(0.1, eps=np.float32(-1))


@pytest.mark.parametrize("case", ["sgd", "rowwise_adagrad", "rowwise_adam"])
def test_rows_of_no_features_do_not_move(case, implementation):
    optimizer, table, ids = make(case), jnp.ones((V, 0)), jnp.array([[1, 2]])
    gradient = squares_gradient(table, ids, implementation)
    updates, state = optimizer.update(gradient, optimizer.init(table), table)
    assert optax.apply_updates(table, updates).shape == (V, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_gradient_of_another_table_is_refused():
    optimizer, table = optim.sgd(0.1), jnp.ones((V, D))
    rows = jbag.RowSparse.from_rows([1], jnp.ones((1, D)), num_embeddings=V + 1)
    with pytest.raises(
        ValueError, match=r"shape of its table, \(12, 3\); got \(13, 3\)"
    ):
        optimizer.update(rows, optimizer.init(table), table)

"""Optimizers with `lazy=False` against Optax on dense gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax

import jbag
from jbag import optim

pytestmark = pytest.mark.standard_promotion

V, D, B, L = 40, 4, 6, 3
STEPS, CHUNK = 1000, 100
# Over a thousand steps rounding errors add up; tables have numbers up to 2.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def cosine(rate):
    return optax.cosine_decay_schedule(rate, STEPS)


def warm_up(rate):
    return optax.linear_schedule(0.0, rate, 50)


def labels(params):
    return {k: "table" if k == "table" else "rest" for k in params}


def l2(weight_decay, optimizer):
    return optax.chain(optax.add_decayed_weights(weight_decay), optimizer)


ADAM = functools.partial(optim.adam, lazy=False)
ADAMW = functools.partial(optim.adamw, lazy=False)
SGD = functools.partial(optim.sgd, lazy=False)
ROOTS = {"initial_accumulator_value": 0.1, "eps": 0.0}
DECAYED = {"weight_decay": 0.1}

# By name: ours, and that of Optax.
CASES = {
    "adam": (ADAM(1e-2), optax.adam(1e-2)),
    "adam with a schedule and a large epsilon": (
        ADAM(cosine(1e-2), 0.8, 0.9, eps=1e-3),
        optax.adam(cosine(1e-2), 0.8, 0.9, eps=1e-3),
    ),
    "adam without momentum": (ADAM(1e-2, b1=0.0), optax.adam(1e-2, b1=0.0)),
    "adam of a long memory": (
        ADAM(1e-2, 0.99, 0.9999),
        optax.adam(1e-2, 0.99, 0.9999),
    ),
    "adamw": (ADAMW(warm_up(1e-2), **DECAYED), optax.adamw(warm_up(1e-2), **DECAYED)),
    "momentum": (SGD(cosine(3e-3), 0.9), optax.sgd(cosine(3e-3), 0.9)),
    "nesterov": (
        SGD(3e-3, 0.95, nesterov=True),
        optax.sgd(3e-3, 0.95, nesterov=True),
    ),
    "decay alone": (SGD(cosine(3e-2), **DECAYED), l2(0.1, optax.sgd(cosine(3e-2)))),
    "adagrad": (
        optim.adagrad(0.1, **ROOTS, lazy=False),
        optax.adagrad(0.1, **ROOTS),
    ),
    "injected": (
        optax.inject_hyperparams(optim.adamw)(cosine(1e-2), **DECAYED, lazy=False),
        optax.inject_hyperparams(optax.adamw)(cosine(1e-2), **DECAYED),
    ),
    "chained in a partition": (
        optax.partition(
            {
                "table": optax.chain(optim.scale(2.0), ADAM(1e-2)),
                "rest": optax.sgd(1e-2),
            },
            labels,
        ),
        optax.partition(
            {
                "table": optax.chain(optax.scale(2.0), optax.adam(1e-2)),
                "rest": optax.sgd(1e-2),
            },
            labels,
        ),
    ),
}


def start(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"table": (V, D), "bias": (D,), "scalar": ()}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def make_batches(steps=STEPS):
    """Return ids and cotangents: eight rows always, the others in rare bursts."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 8, (steps, B, L))
    for step in range(0, steps, 200):
        ids[step : step + 3] = rng.integers(0, V, (3, B, L))
    cotangents = rng.normal(size=(steps, B, D))
    return jnp.asarray(ids, jnp.int32), jnp.asarray(cotangents, jnp.float32)


def loss(params, batch, sparse, implementation=None):
    """Return a loss whose gradient depends on what is read, and the pooled rows."""
    ids, cotangents = batch
    pooled = jbag.embedding_bag(
        params["table"], ids, sparse=sparse, implementation=implementation
    )
    out = pooled + params["bias"] * params["scalar"]
    return (out * (cotangents + 0.1 * out)).mean(), pooled


def scan_steps(optimizer, sparse, implementation=None):
    """Return a function that takes many steps and returns what each step read."""
    run = functools.partial(loss, sparse=sparse, implementation=implementation)
    differentiate = jbag if sparse else jax

    def step(carry, batch):
        params, state = carry
        if sparse:
            reads, _ = jbag.grad(run, has_aux=True)(params, batch)
            params, state = optim.catch_up(params, state, reads)
        gradient, pooled = differentiate.grad(run, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), pooled

    return jax.jit(functools.partial(lax.scan, step), donate_argnums=0)


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        np.asarray(expected, np.float64),
        **(tolerance or TOLERANCE),
    )


@functools.cache
def train_dense(case):
    optimizer = CASES[case][1]
    return list(train(optimizer, False))


def train(optimizer, sparse, implementation=None):
    """Yield, for each chunk of steps, what they read and the parameters after them."""
    ids, cotangents = make_batches()
    scan = scan_steps(optimizer, sparse, implementation)
    carry = start(), optimizer.init(start())
    for first in range(0, STEPS, CHUNK):
        chunk = slice(first, first + CHUNK)
        carry, pooled = scan(carry, (ids[chunk], cotangents[chunk]))
        params = carry[0]
        if sparse:
            params, _ = jax.jit(optim.catch_up)(*carry)
        yield np.array(pooled), jax.tree.map(np.array, params)


@pytest.mark.parametrize("case", CASES)
def test_a_thousand_steps_equal_optax_with_dense_gradients(case, implementation):
    ours = train(CASES[case][0], True, implementation)
    for (pooled, params), (expected, peers) in zip(
        ours, train_dense(case), strict=True
    ):
        close(pooled, expected)
        jax.tree.map(close, params, peers)


ROWWISE = optim.rowwise_adam(cosine(1e-2), eps=1e-3, weight_decay=0.1, lazy=False)


def test_rowwise_adam_equals_its_dense_updates(implementation):
    for (pooled, params), (expected, peers) in zip(
        train(ROWWISE, True, implementation), train(ROWWISE, False), strict=True
    ):
        close(pooled, expected)
        jax.tree.map(close, params, peers)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def take_step(optimizer, sparse, params, state, batch):
    run = functools.partial(loss, sparse=sparse)
    if sparse:
        reads, _ = jbag.grad(run, has_aux=True)(params, batch)
        params, state = optim.catch_up(params, state, reads)
    gradient, _ = (jbag if sparse else jax).grad(run, has_aux=True)(params, batch)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def walk(optimizer, sparse, steps, params):
    ids, cotangents = make_batches(steps)
    state = optimizer.init(params)
    for k in range(steps):
        params, state = take_step(
            optimizer, sparse, params, state, (ids[k], cotangents[k])
        )
    return params, state


@pytest.mark.parametrize("seed", [None, 0])
def test_bfloat16_tables_round_once_a_step(seed):
    ours = optim.adamw(0.02, **DECAYED, lazy=False, stochastic_rounding=seed)
    halves = start("bfloat16")
    whole = jax.tree.map(lambda x: x.astype("float32"), halves)
    params, state = optim.catch_up(*walk(ours, True, 60, halves))
    peers, _ = walk(optax.adamw(0.02, **DECAYED), False, 60, whole)
    assert params["table"].dtype == jnp.bfloat16
    assert state.states["mu"]["table"].dtype == jnp.float32
    close(params["table"], peers["table"], rtol=0.02, atol=0.05)


@pytest.mark.usefixtures("x64")
def test_float64_tables_equal_optax():
    params, state = walk(ADAMW(0.02), True, 60, start("float64"))
    params, _ = optim.catch_up(params, state)
    peers, _ = walk(optax.adamw(0.02), False, 60, start("float64"))
    assert params["table"].dtype == jnp.float64
    close(params["table"], peers["table"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "reads",
    [
        {"table": jnp.array([[1, 30], [30, -1]]), "bias": None, "scalar": None},
        {
            "table": jbag.Bags.from_lists([[1], [30, 1]]),
            "bias": None,
            "scalar": jnp.ones(()),
        },
        {"table": np.array([1, 30, V, 2**31 - 1]), "bias": None, "scalar": None},
    ],
    ids=["ids", "bags", "out of range"],
)
def test_the_rows_of_ids_are_caught_up(reads):
    params, state = walk(ADAM(0.1), True, 60, start())
    every, _ = optim.catch_up(params, state)
    some, after = jax.jit(optim.catch_up)(params, state, reads)
    swept = {60 % 1023} & set(range(V))
    read = sorted({1, 30} | swept)
    close(some["table"][np.array(read)], every["table"][np.array(read)])
    assert (after.steps["table"][np.array(read)] == 60).all()
    others = np.setdiff1d(np.arange(8, V), read)
    np.testing.assert_array_equal(some["table"][others], params["table"][others])
    again, _ = optim.catch_up(some, after, reads)
    np.testing.assert_array_equal(again["table"], some["table"])


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_all_rows_that_bags_name_are_caught_up(mode):
    ids = jnp.array([[9, 10], [11, 12]], jnp.int32)
    run = lambda params: jbag.embedding_bag(
        params["table"], ids, mode=mode, sparse=True
    ).sum()
    params, state = walk(ADAM(0.1), True, 60, start())
    _, state = optim.catch_up(params, state, jbag.grad(run)(params))
    assert (state.steps["table"][9:13] == 60).all()


@pytest.mark.parametrize("optimizer", [ADAM(0.1), SGD(0.1, 0.9), ROWWISE])
def test_a_stale_row_that_is_updated_becomes_nan(optimizer, implementation):
    params, state = walk(optimizer, True, 5, start())
    stale = int(np.flatnonzero(np.asarray(state.steps["table"]) < 5)[0])
    ids = jnp.array([[stale]], jnp.int32)
    run = functools.partial(loss, sparse=True, implementation=implementation)
    gradient, _ = jbag.grad(run, has_aux=True)(params, (ids, jnp.ones((1, D))))
    updates, _ = optimizer.update(gradient, state, params)
    table = optax.apply_updates(params, updates)["table"]
    assert jnp.isnan(table[stale]).all()
    assert jnp.isfinite(jnp.delete(table, stale, axis=0)).all()
    dense = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(dense, state, params)
    assert jnp.isnan(updates["table"][stale]).all()


def test_a_row_that_missed_more_than_is_recorded_becomes_nan(implementation):
    optimizer, table = ADAM(0.1), jnp.ones((3, 2))
    rows = jbag.RowSparse.from_rows([0, 1], jnp.ones((2, 2)), num_embeddings=3)

    @jax.jit
    def never_catch_up(state):
        body = lambda _, state: optimizer.update(jnp.zeros((3, 2)), state)[1]
        return lax.fori_loop(0, 1024, body, state)

    state = optimizer.init(table)
    _, state = optimizer.update(rows, state, table)
    steps = state.steps
    state = never_catch_up(state)._replace(steps=steps)
    run = lambda t: jbag.embedding_bag(
        t, jnp.array([[1]]), sparse=True, implementation=implementation
    ).sum()
    after, _ = optim.catch_up(table, state, jbag.grad(run)(table))
    assert jnp.isnan(after[1]).all()
    assert jnp.isfinite(after[0]).all()
    assert jnp.isnan(optim.catch_up(table, state)[0]).all()


def test_a_sweep_reads_every_row_in_time():
    optimizer, table = SGD(0.1, 0.9), jnp.ones((2100, 1))
    rows = jbag.RowSparse.from_rows([5], jnp.ones((1, 1)), num_embeddings=2100)

    @jax.jit
    def run(table, state):
        def body(carry, _):
            table, state = optim.catch_up(*carry, jnp.array([5]))
            updates, state = optimizer.update(rows, state, table)
            lag = (state.count - state.steps).max()
            return (optax.apply_updates(table, updates), state), lag

        return lax.scan(body, (table, state), length=2100)

    (table, state), lags = run(table, optimizer.init(table))
    assert lags.max() < state.missed["row"].size == 1024
    assert (np.bincount(np.asarray(2100 - state.steps))).max() <= 3
    assert jnp.isfinite(table).all()


def test_packed_tables_are_caught_up():
    table = start()["table"]
    packed = jbag.pack(table, always=True)
    ids, cotangents = make_batches(60)

    def run(table):
        optimizer = ADAMW(0.1)
        state = optimizer.init(table)

        @jax.jit
        def step(table, state, ids, cotangents):
            value = lambda t: jnp.vdot(
                jbag.embedding_bag(t, ids, sparse=True), cotangents
            )
            table, state = optim.catch_up(table, state, jbag.grad(value)(table))
            updates, state = optimizer.update(jbag.grad(value)(table), state, table)
            return optax.apply_updates(table, updates), state

        for k in range(60):
            table, state = step(table, state, ids[k], cotangents[k])
        some, _ = optim.catch_up(table, state, jnp.arange(20))
        return some, *optim.catch_up(table, state)

    jax.tree.map(close, jbag.unpack(run(packed)), run(table))


def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    run = functools.partial(loss, sparse=True)
    ids, cotangents = make_batches(40)

    @jax.jit
    def step(state, batch):
        reads, _ = jbag.grad(run, has_aux=True)(state.params, batch)
        params, opt_state = optim.catch_up(state.params, state.opt_state, reads)
        state = state.replace(params=params, opt_state=opt_state)
        gradient, _ = jbag.grad(run, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads=gradient)

    def go_on(state, steps):
        for k in steps:
            state = step(state, (ids[k], cotangents[k]))
        return state

    tx = optax.chain(optim.clip_by_global_norm(1.0), ADAMW(0.1))
    state = TrainState.create(apply_fn=None, params=start(), tx=tx)
    half = go_on(state, range(20))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", half)
    end = go_on(restored, range(20, 40))
    expected = go_on(half, range(20, 40))
    jax.tree.map(np.testing.assert_array_equal, end.params, expected.params)
    jax.tree.map(np.testing.assert_array_equal, end.opt_state, expected.opt_state)
    assert isinstance(end.opt_state[1], optim.CatchUpState)


def test_nnx_optimizers_equal_optax_with_dense_gradients():
    def run(sparse, tx):
        bag = jbag.nnx.EmbeddingBag(V, D, sparse=sparse, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(bag, tx, wrt=nnx.Param)
        differentiate = jbag.grad if sparse else nnx.grad

        @nnx.jit
        def step(bag, optimizer, ids, cotangents):
            value = lambda bag: jnp.vdot(bag(ids), cotangents)
            if sparse:
                jbag.nnx.catch_up(bag, optimizer, differentiate(value)(bag))
            optimizer.update(bag, differentiate(value)(bag))

        for ids, cotangents in zip(*make_batches(60), strict=True):
            step(bag, optimizer, ids, cotangents)
        if sparse:
            jbag.nnx.catch_up(bag, optimizer)
        return bag.embedding[...]

    close(run(True, ADAMW(0.1)), run(False, optax.adamw(0.1)))


def test_a_donated_table_is_caught_up_in_place(require):
    require("cpu")
    size = 4 * 200_000 * 16
    table = jax.ShapeDtypeStruct((200_000, 16), jnp.float32)
    optimizer = ADAMW(0.1)

    def step(table, state, ids):
        value = lambda t: jbag.embedding_bag(t, ids, sparse=True).sum()
        table, state = optim.catch_up(table, state, jbag.grad(value)(table))
        updates, state = optimizer.update(jbag.grad(value)(table), state, table)
        return optax.apply_updates(table, updates), state

    shapes = table, jax.eval_shape(optimizer.init, table)
    ids = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*shapes, ids).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < size / 20
    assert memory.alias_size_in_bytes >= 3 * size
    program = compiled.as_text().splitlines()
    assert not [x for x in program if "[200000,16]" in x and " copy(" in x]


def test_a_step_is_lowered_for_every_platform():
    optimizer, table = ADAMW(0.1), start()["table"]

    @jax.jit
    def step(table, state, ids):
        value = lambda t: (jbag.embedding_bag(t, ids, sparse=True) ** 2).sum()
        table, state = optim.catch_up(table, state, jbag.grad(value)(table))
        updates, state = optimizer.update(jbag.grad(value)(table), state, table)
        return optax.apply_updates(table, updates), state

    args = table, optimizer.init(table), jnp.arange(24, dtype=jnp.int32).reshape(6, 4)
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*args)
    if jax.default_backend() in exported.platforms:
        jax.tree.map(close, exported.call(*args), step(*args))


def test_tables_are_caught_up_under_vmap():
    params, state = walk(ADAM(0.1), True, 60, start())
    table, state = (
        params["table"],
        state._replace(
            states={k: x["table"] for k, x in state.states.items()},
            steps=state.steps["table"],
        ),
    )
    both = jax.tree.map(lambda x: jnp.stack([x, x]), (table, state))
    ids = jnp.array([[9], [30]])
    many, _ = jax.vmap(optim.catch_up)(*both, ids)
    for k in range(2):
        close(many[k], optim.catch_up(table, state, ids[k])[0])


def test_bad_arguments_are_named():
    params, state = start(), ADAM(0.1).init(start())
    with pytest.raises(ValueError, match="state of an optimizer with `lazy=False`"):
        optim.catch_up(params, optim.adam(0.1).init(params))
    with pytest.raises(ValueError, match=r"entry for each parameter; got none for"):
        optim.catch_up(params, state, {"table": None})
    with pytest.raises(ValueError, match=r"ids for tables \[V, D\] only"):
        optim.catch_up(params, state, dict.fromkeys(params, jnp.array([1])))
    with pytest.raises(TypeError, match="must be None, ids, Bags or a gradient"):
        optim.catch_up(params, state, dict.fromkeys(params, jnp.array([True])))
    rows = jbag.RowSparse.from_rows([1], jnp.ones((1, D)), num_embeddings=V + 1)
    with pytest.raises(ValueError, match=r"shape of its table, \(40, 4\); got \(41"):
        optim.catch_up(params, state, dict.fromkeys(params) | {"table": rows})
    with pytest.raises(ValueError, match="`params` must have the structure"):
        optim.catch_up({"other": params["table"]}, state)
    twice = optax.chain(SGD(0.1, 0.9), ADAM(0.1))
    with pytest.raises(ValueError, match="and each parameter one optimizer"):
        optim.catch_up(params, twice.init(params))
    with pytest.raises(ValueError, match=r"`b2` must be at least `b1` \*\* 2, 0.81"):
        optim.adam(0.1, b2=0.5, lazy=False)
    with pytest.raises(TypeError, match="`lazy`"):
        optim.sgd(0.1, lazy=1)

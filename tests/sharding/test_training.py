"""Training tables over a mesh, against one device; and what it costs."""

import functools
import re

import collection_cases as cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from slow import slow

import jbag
from jbag import optim
from jbag.sharding import TableWise

pytestmark = pytest.mark.standard_promotion


# By name: the spec, and the rows per round.
STRATEGIES = {
    "row_wise": (P("x", None), None),
    "row_wise in rounds": (P("x", None), 1),
    "column_wise": (P(None, "x"), None),
    "data_parallel": (P(), None),
    "table_wise": (TableWise("x", lanes=4), None),
}
TABLES, FEATURES = cases.only("plain_mean", "padded_sum", "counted_max")


def make(strategy=None, mesh=None, **options):
    options = {"grid": 12, "sparse": True, "mesh": mesh} | options
    if strategy is not None:
        spec, rows_per_round = STRATEGIES[strategy]
        options |= {"specs": {"embedding": spec}, "rows_per_round": rows_per_round}
    return jbag.EmbeddingBagCollection(TABLES, FEATURES, **options)


def batch_of(step, blocks=None):
    """Return the cases' bags, of other ids in each step."""

    def shift(name, bags):
        size = TABLES[cases.CASES[name][0]].num_embeddings
        move = lambda ids: jnp.asarray(
            np.where((ids >= 0) & (ids < size), (ids + step) % size, ids)
        )
        if isinstance(bags, np.ndarray):
            return move(bags)
        return jbag.Bags(move(bags.indices), bags.offsets, bags.weights)

    pack = cases.pack_on_host
    if blocks is not None:
        pack = functools.partial(cases.in_blocks_on_host, blocks=blocks)
    return {name: shift(name, pack(name)) for name in FEATURES}


def squares(collection, params, batch):
    out = collection.apply({"params": params["tables"]}, batch)
    known = [jnp.where(jnp.isnan(x), 0, x + params["bias"]) for x in out.values()]
    return sum((x**2).mean() for x in known)


def decreasing(count):
    return 0.3 / (1 + count.astype(float))


# Of each kind of state and of update; how each rule moves rows is tested in `optim`.
OPTIMIZERS = {
    "sgd": optim.sgd(decreasing, weight_decay=0.1),
    "momentum": optim.sgd(0.1, 0.9, dampening=0.3, nesterov=True),
    "rowwise_adam": optim.rowwise_adam(decreasing, eps=1e-3),
    "ftrl": optim.ftrl(0.1, l1=0.01, l2=0.1, beta=0.5),
    "clipped": optax.chain(optim.clip_by_global_norm(0.5), optim.sgd(0.3)),
    "clipped rows": optax.chain(optim.clip_by_row_norm(0.1), optim.adagrad(0.3)),
    "decayed": optax.chain(optim.add_decayed_weights(0.5), optim.rowwise_adagrad(0.1)),
}


def start(collection):
    tables = collection.import_tables({k: cases.values()[k] for k in TABLES})
    return {"tables": tables, "bias": jnp.linspace(-1, 1, cases.D)}


def train(collection, batches):
    """Return all tables and states after some steps of each optimizer."""
    loss = functools.partial(squares, collection)
    # The gradients leave one program, and enter another.
    differentiate = jax.jit(jbag.grad(loss))

    @jax.jit
    def move(gradients, states, each):
        moved = {}
        for name, optimizer in OPTIMIZERS.items():
            own = gradients[name], states[name], each[name]
            updates, state = optimizer.update(*own)
            moved[name] = optax.apply_updates(each[name], updates), state
        return moved

    params = start(collection)
    moved = {name: (params, x.init(params)) for name, x in OPTIMIZERS.items()}
    if collection.mesh is not None:
        moved = jax.device_put(moved, collection.shardings(moved))
    for batch in batches:
        each, states = ({k: x[i] for k, x in moved.items()} for i in (0, 1))
        gradients = {k: differentiate(x, batch) for k, x in each.items()}
        moved = move(gradients, states, each)
    return by_table(collection, moved)


def by_table(collection, tree):
    """Return a tree in which stacks are tables: each row in the order of its ids."""
    is_stacks = lambda x: isinstance(x, dict) and "embedding_4" in x
    export = lambda x: collection.export_tables(x) if is_stacks(x) else x
    return jax.tree.map(export, jax.device_get(tree), is_leaf=is_stacks)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@functools.cache
def on_one_device():
    return train(make(), [batch_of(step) for step in range(3)])


@pytest.mark.parametrize(
    ("strategy", "packed"),
    [
        ("row_wise", False),
        *slow(
            ("row_wise in rounds", False),
            ("column_wise", False),
            ("table_wise", False),
            ("data_parallel", False),
            ("row_wise", True),
            ("row_wise in rounds", True),
            ("table_wise", True),
            ("data_parallel", True),
        ),
    ],
)
def test_each_optimizer_moves_tables_as_on_one_device(strategy, packed):
    kind = "explicit" if strategy == "row_wise" else "auto"
    collection = make(strategy, make_mesh(kind), packed=packed)
    trained = train(collection, [batch_of(step, 4) for step in range(3)])
    jax.tree.map(close, trained, on_one_device())


def linear(collection, params, batch):
    """Return a loss whose cotangent doesn't depend on what is pooled."""
    out = collection.apply({"params": params["tables"]}, batch)
    return sum((x + params["bias"]).sum() for x in out.values())


def accumulate(collection, blocks):
    """Return what a step of two batches makes of the tables."""
    params = start(collection)
    if collection.mesh is not None:
        params = jax.device_put(params, collection.shardings(params))
    optimizer = optim.rowwise_adagrad(0.3, eps=1e-3)
    batches = [batch_of(k, blocks) for k in range(2)]

    @jax.jit
    def step(params, batches):
        both = jbag.value_and_grad(functools.partial(squares, collection))
        value, gradient = optim.accumulate_gradients(both, 2)(params, batches)
        state = optimizer.init(params)
        updates, state = optimizer.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)
    return by_table(collection, step(params, stacked))


@functools.cache
def accumulated_on_one_device():
    return accumulate(make(), None)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("row_wise", "auto"),
        *slow(("column_wise", "explicit"), ("data_parallel", "auto")),
    ],
)
def test_gradients_of_several_batches_accumulate(strategy, kind):
    got = accumulate(make(strategy, make_mesh(kind)), 4)
    jax.tree.map(close, got, accumulated_on_one_device())


@pytest.mark.parametrize("strategy", ["row_wise", *slow("column_wise", "table_wise")])
def test_half_tables_round_at_random(strategy):
    """Small steps are lost by rounding to nearest, but not on the average at random."""
    table = jbag.Table(64, cases.D, param_dtype=jnp.bfloat16)
    options = dict(zip(("specs", "rows_per_round"), STRATEGIES[strategy], strict=True))
    options["specs"] = {"embedding": options["specs"]}
    collection = jbag.EmbeddingBagCollection(
        {"a": table}, {"a": jbag.Feature("a", "sum")}, mesh=make_mesh(), **options,
        grid=12, sparse=True,
    )  # fmt: skip
    optimizer = optim.sgd(2.0**-11, stochastic_rounding=7)
    params = collection.import_tables({"a": jnp.ones((64, cases.D), jnp.bfloat16)})
    params = jax.device_put(params, collection.shardings(params))

    @jax.jit
    def step(params, state, ids):
        loss = lambda p: collection.apply({"params": p}, {"a": ids})["a"].sum()
        gradient = jbag.grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    ids = jnp.arange(64).reshape(16, 4)
    state = optimizer.init(params)
    for _ in range(8):
        params, state = step(params, state, ids)
    moved = np.asarray(collection.export_tables(params)["a"], np.float32)
    assert abs((1 - moved).mean() / (8 * 2.0**-11) - 1) < 0.2
    assert np.unique(moved).size > 1


class Linen(nn.Module):
    bags: nn.Module

    @nn.compact
    def __call__(self, batch):
        return nn.Dense(1)(jnp.nan_to_num(self.bags(batch)))


def make_state(collection, key=None):
    model = Linen(collection)
    key = jax.random.key(0) if key is None else key
    params = model.init(key, batch_of(0, None if collection.mesh is None else 4))
    tx = optim.adam(0.1, eps=1e-3)
    return TrainState.create(apply_fn=model.apply, params=params["params"], tx=tx)


@pytest.mark.parametrize(("before", "after"), [(4, 2), *slow((2, 4))])
def test_packed_tables_go_on_with_other_devices(before, after):
    """Lines of blocks for some devices are restored to blocks for others."""
    optimizer = optim.adam(0.1, eps=1e-3)

    def train(devices, steps, restored=None):
        collection = make("row_wise", make_mesh(sizes=(devices,)), packed=True)
        params = start(collection)
        state = optimizer.init(params)
        trained = jax.device_put((params, state), collection.shardings((params, state)))
        if restored is not None:
            trained = jbag.pack_like(restored, like=trained)
            trained = jax.device_put(trained, collection.shardings(trained))
        lines = trained[0]["tables"]["embedding_4"].lines
        assert lines.sharding.spec == P("x", None)
        assert {x.data.shape[0] for x in lines.addressable_shards} == {
            lines.shape[0] // devices
        }

        @jax.jit
        def step(trained, batch):
            params, state = trained
            loss = functools.partial(squares, collection)
            gradient = jbag.grad(loss)(params, batch)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        for k in steps:
            trained = step(trained, batch_of(k, devices))
        return jax.device_get(jbag.unpack(trained))

    whole = train(before, range(4))
    saved = train(before, range(2))
    tables = [x for x in jax.tree.leaves(saved) if x.ndim == 2]
    assert {x.shape for x in tables} == {(60, cases.D)}
    jax.tree.map(close, train(after, range(2, 4), saved), whole)


@pytest.mark.parametrize(
    "strategy", ["row_wise", *slow("column_wise", "data_parallel")]
)
def test_a_train_state_is_made_and_moves_where_it_lies(strategy):
    mesh = make_mesh()
    # Of one grid, arrays start alike on one device and on several.
    one = make(concatenate=True)
    many = make(strategy, mesh, concatenate=True)
    spec = STRATEGIES[strategy][0]
    abstract = jax.eval_shape(lambda: make_state(many))
    table = abstract.params["bags"]["embedding_4"]
    assert nn.get_partition_spec(abstract).params["bags"]["embedding_4"] == P(
        *(*spec, None, None)[:2]
    )
    assert table.names == (*spec, None, None)[:2]
    create = lambda: nn.unbox(make_state(many))
    state = jax.jit(create, out_shardings=many.shardings(jax.eval_shape(create)))()
    expected = jax.jit(lambda: make_state(one))()
    lies = NamedSharding(mesh, P(*(*spec, None, None)[:2]))
    tables = [state.params["bags"]["embedding_4"]]
    tables += [x["bags"]["embedding_4"] for x in state.opt_state.states.values()]
    for x in tables:
        assert x.sharding.is_equivalent_to(lies, 2)
    assert state.params["Dense_0"]["kernel"].sharding.is_fully_replicated

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        loss = lambda p: (state.apply_fn({"params": p}, batch) ** 2).mean()
        value, gradient = jbag.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    for k in range(3):
        state, value = step(state, batch_of(k, 4))
        expected, wanted = step(expected, batch_of(k))
        close(value, wanted)
    jax.tree.map(close, state.params, expected.params)
    assert state.params["bags"]["embedding_4"].sharding.is_equivalent_to(lies, 2)


@pytest.mark.slow
def test_training_goes_on_with_tables_that_lie_whole_and_back():
    """Whole tables lie in other rows: they, and their state, go by way of tables."""
    optimizer = optim.rowwise_adam(0.1, eps=1e-3)

    def train(collection, params, state, steps):
        blocks = None if collection.mesh is None else 4

        def loss(params, batch):
            pooled = collection.apply({"params": params}, batch).values()
            return sum((jnp.nan_to_num(x) ** 2).sum() for x in pooled)

        @jax.jit
        def step(params, state, batch):
            gradient = jbag.grad(loss)(params, batch)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        for k in steps:
            params, state = step(params, state, batch_of(k, blocks))
        return params, state

    def start(collection):
        params = collection.import_tables({k: cases.values()[k] for k in TABLES})
        return params, optimizer.init(params)

    one = make()
    expected = [
        one.export_tables(x)
        for params, state in [train(one, *start(one), range(6))]
        for x in (params, *state.states.values())
    ]
    before = make("row_wise", make_mesh())
    params, state = train(before, *start(before), range(2))
    for strategy, steps in (("table_wise", (2, 3)), ("column_wise", (4, 5))):
        after = make(strategy, make_mesh())
        move = lambda x: after.import_tables(before.export_tables(x))  # noqa: B023  (called at once)
        params, states = move(params), {k: move(x) for k, x in state.states.items()}
        params, state = train(after, params, state._replace(states=states), steps)
        before = after
    found = [after.export_tables(x) for x in (params, *state.states.values())]
    jax.tree.map(close, found, expected)


FEW = cases.only("plain_mean", "padded_sum")


class NNX(nnx.Module):
    def __init__(self, **options):
        self.bags = jbag.nnx.EmbeddingBagCollection(
            *FEW,
            grid=12,
            sparse=True,
            concatenate=True,
            rngs=nnx.Rngs(0),
            **options,
        )
        self.head = nnx.Linear(2 * cases.D, 1, rngs=nnx.Rngs(1))

    def __call__(self, batch):
        own = {name: batch[name] for name in FEW[1]}
        return self.head(jnp.nan_to_num(self.bags(own)))


def test_nnx_optimizers_move_tables():
    mesh, spec = make_mesh("explicit"), P("x", None)

    def run(model, blocks):
        tx = optim.rowwise_adagrad(0.3, eps=1e-3)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, batch):
            loss = lambda model: (model(batch) ** 2).mean()
            value, gradient = jbag.value_and_grad(loss)(model)
            optimizer.update(model, gradient)
            return value

        values = [step(model, optimizer, batch_of(k, blocks)) for k in range(3)]
        return values, model.bags.export_tables()

    with jax.set_mesh(mesh):
        model = NNX(specs={"embedding": spec})
        assert model.bags.embedding_4.get_metadata()["out_sharding"] == spec
        assert model.bags.embedding_4[...].sharding.spec == spec
        got = run(model, 4)
    got = jax.tree.map(np.asarray, got)
    jax.tree.map(close, got, run(NNX(), None))


V, WIDTH = 200_000, 32
DEVICES, BAGS, LENGTH = 4, 64, 16


def compile_step(spec, loss, optimizer, rows_per_round=None):
    """Return a compiled step, and the bytes of a device's part of table and states."""
    mesh = make_mesh()
    collection = jbag.EmbeddingBagCollection(
        {"items": jbag.Table(V, WIDTH)},
        {"items": jbag.Feature("items")},
        specs={"embedding": spec},
        mesh=mesh,
        rows_per_round=rows_per_round,
        sparse=True,
    )

    def step(params, state, ids):
        both = jbag.value_and_grad(functools.partial(loss, collection))
        value, gradient = both(params, {"items": ids})
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    ids = jax.ShapeDtypeStruct((DEVICES * BAGS, LENGTH), jnp.int32)

    def create():
        zeros = {"items": jnp.zeros((V, WIDTH))}
        params = {"tables": collection.import_tables(zeros), "bias": jnp.zeros(WIDTH)}
        return params, optimizer.init(params)

    shapes = jax.eval_shape(create)
    lies = collection.shardings(shapes)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, lies
    )
    ids = jax.ShapeDtypeStruct(
        ids.shape, ids.dtype, sharding=NamedSharding(mesh, P("x", None))
    )
    outs = (*lies, NamedSharding(mesh, P()))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=outs)
    own = sum(
        int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize
        for x, s in zip(*map(jax.tree.leaves, (shapes, lies)), strict=True)
    )
    return jitted.lower(*shapes, ids).compile(), own


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)"
    r"(?:-start)?\("
)


def collectives(compiled):
    """Return the kind of each collective, and how many bytes its result has."""
    found = []
    for result, kind in COLLECTIVE.findall(compiled.as_text()):
        shapes = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", result)
        assert shapes
        sizes = [
            int(bits) // 8 * np.prod([int(n) for n in shape.split(",") if n])
            for bits, shape in shapes
        ]
        found.append((kind, sum(sizes)))
    return found


@pytest.mark.parametrize(
    ("loss", "optimizer", "rows_per_round"),
    [
        (squares, optim.rowwise_adagrad(0.1), None),
        *slow(
            (linear, optim.rowwise_adagrad(0.1), None),
            (linear, optim.adam(0.1), 64),  # which takes several rounds
            (linear, optim.sgd(0.1), 512),
        ),
    ],
)
def test_no_shard_is_copied_and_only_named_rows_are_sent(
    loss, optimizer, rows_per_round, require
):
    require("cpu")
    compiled, own = compile_step(P("x", None), loss, optimizer, rows_per_round)
    memory = compiled.memory_analysis()
    shard = V * WIDTH * 4 / DEVICES
    assert memory.temp_size_in_bytes < shard / 5
    assert memory.alias_size_in_bytes >= own
    slots = BAGS * LENGTH
    if rows_per_round is None:
        rows_per_round = (
            -(-(slots / DEVICES + 6 * (slots / DEVICES) ** 0.5 + 8) // 8) * 8
        )
    ids = DEVICES * rows_per_round * 4
    for kind, size in collectives(compiled):
        if kind == "all-to-all":
            assert size in (ids, ids * WIDTH)
        else:
            assert kind == "all-reduce"
            assert size <= WIDTH * 4 + 8  # the bias's gradient, the loss, the rounds
    sent = [size for kind, size in collectives(compiled) if kind == "all-to-all"]
    assert sorted(sent) == [ids] * 2 + [ids * WIDTH] * 2


@pytest.mark.parametrize("spec", [P(None, "x"), P(), TableWise("x", lanes=4)], ids=str)
def test_tables_that_lie_otherwise_are_not_copied_either(spec, require):
    require("cpu")
    compiled, own = compile_step(spec, linear, optim.rowwise_adagrad(0.1))
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < own / 5
    assert memory.alias_size_in_bytes >= own

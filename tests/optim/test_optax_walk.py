"""A function that maps over a `RowSparse` equals the dense result, or raises.

The walk takes every public transformation and optimizer of Optax. Nothing of jbag is
used but its public functions. To print how many cases are equal, raise or are wrong::

    export JAX_NUM_CPU_DEVICES=4 PYTHONPATH=tests/support
    python tests/optim/test_optax_walk.py
"""

import collections
import functools
import inspect
import itertools
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, some_devices

import jbag
from jbag import optim

V, D = 12, 2  # four devices divide V
SGD = optim.sgd(0.1)


@pytest.fixture(autouse=True)
def strict_promotion():
    """Optax relies on JAX's default promotion."""


tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Let go of compiled programs by the memory maps they keep, of 65530 on Linux.

    A walk compiles an operation at a time, more of them in a test than elsewhere, and
    most are shared by the next tests.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(tests_run) % 10 == 0 and maps.exists():
        with maps.open("rb") as lines:
            if sum(1 for _ in lines) > 35_000:
                jax.clear_caches()


def start():
    rng = np.random.default_rng(0)
    shapes = {"table": (V, D), "bias": (D,)}
    return {k: jnp.asarray(rng.normal(size=s), "float32") for k, s in shapes.items()}


# No batch names row 0, which gets what is lost; row 3 has three slots in the first.
BATCHES = [
    jnp.array([[3, 4, 3], [5, 3, 7]], jnp.int32),
    jnp.array([[1, 4, 9], [2, 2, 8]], jnp.int32),
]
SIGNS = np.array([1, -1], np.float32)  # of what the gradients are, more or less


def loss(params, ids, sparse):
    """Pool bags of each layout, so that the gradient has every kind of leaf."""
    pool = functools.partial(jbag.embedding_bag, params["table"], sparse=sparse)
    weights = jnp.linspace(0.5, 2, ids.size, dtype=jnp.float32)
    ragged = jbag.Bags(ids.ravel(), jnp.array([0, 2, ids.size], jnp.int32), weights)
    pooled = [pool(ids, mode="sum"), pool(ragged), pool(ids, mode="max")]
    return sum(((x + params["bias"]) ** 2 @ SIGNS).sum() for x in pooled)


def small_loss(params, ids, sparse):
    """Pool once, where the layout doesn't matter."""
    pooled = jbag.embedding_bag(params["table"], ids, mode="sum", sparse=sparse)
    return ((pooled + params["bias"]) ** 2 @ SIGNS).sum()


def loss_of(sparse, loss=loss):
    return functools.partial(loss, sparse=sparse)


@functools.cache
def gradients(sparse):
    """Return value and gradient for each batch, all of the first parameters."""
    both = jax.jit((jbag if sparse else jax).value_and_grad(loss_of(sparse)))
    return [both(start(), ids) for ids in BATCHES]


def is_rows(x):
    return isinstance(x, jbag.RowSparse)


def densify(tree):
    return jax.tree.map(
        lambda x: x.todense() if is_rows(x) else x, tree, is_leaf=is_rows
    )


def numbers(x):
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def is_close(a, b):
    a, b = numbers(a), numbers(b)
    if a.shape != b.shape:
        return False
    return np.allclose(a, b, **oracle.TOLERANCES["float32"], equal_nan=True)


def equals(found, expected):
    """Whether both trees hold the same numbers, in leaves of the same order."""
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    return len(found) == len(expected) and all(map(is_close, found, expected))


def outcome(run):
    """Return "equal", "wrong", or the error. `run` is told whether to be sparse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no error to users
        try:
            found = jax.block_until_ready(densify(run(True)))
        except Exception as error:  # of any kind: nothing is trained in silence
            return error
        return "equal" if equals(found, run(False)) else "wrong"


def trace_dense(run):
    """Raise if it is not the rows that an error is about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.eval_shape(lambda: run(False))


def check(run, must_equal=False):
    found = outcome(run)
    if isinstance(found, Exception):
        if must_equal:
            raise found
        trace_dense(run)
    assert found != "wrong", "neither the dense result nor an error"


# What parameters are given that have no default, by name. ...
GIVEN = {
    "adv_optimizer": optax.sgd(0.05),
    "base_optimizer": SGD,
    "clipping": 0.1,
    "decay": 0.9,
    "eta": 0.01,
    "gamma": 0.5,
    "inner": SGD,
    "learning_rate": 0.1,
    "max_backtracking_steps": 3,
    "max_consecutive_errors": 2,
    "max_delta": 0.3,
    "max_linesearch_steps": 3,
    "max_norm": 0.5,
    "measure": optax.tree.norm,
    "measure_name": "norm",
    "measures": {"norm": optax.tree.norm},
    "optimizer": SGD,
    "step_size": 0.5,
    "step_size_fn": optax.constant_schedule(0.5),
    "threshold": 0.1,
    "tx": SGD,
}
LABELS = {"table": "rows", "bias": "rest"}
PARTS = {"rows": SGD, "rest": optax.sgd(0.1)}
TABLE, BIAS = {"table": True, "bias": False}, {"table": False, "bias": True}
MATRIX = optax.contrib.MuonDimensionNumbers(0, 1)
MUON = {"table": MATRIX, "bias": optax.MaskedNode()}
# ... And what is built in another way, or with options, by name.
BUILT = {
    "add_decayed_weights": lambda f: f(0.1),
    "add_noise": lambda f: f(0.01, 0.5, jax.random.key(0)),
    "apply_every": lambda f: f(2),
    "chain": lambda f: f(SGD, SGD),
    "conditionally_mask": lambda f: f(SGD, lambda step: step % 2 == 0),
    "conditionally_transform": lambda f: f(SGD, lambda step: step % 2 == 0),
    "freeze": lambda f: f(BIAS),
    "inject_hyperparams": lambda f: f(optim.sgd)(0.1),
    "inject_stateful_hyperparams": lambda f: f(optim.sgd)(0.1),
    "masked": lambda f: f(SGD, TABLE),
    "multi_transform": lambda f: f(PARTS, LABELS),
    "noisy_sgd": lambda f: f(0.1, key=jax.random.key(0)),
    "named_chain": lambda f: f(("first", SGD), ("second", SGD)),
    "partition": lambda f: f(PARTS, LABELS),
    "sam": lambda f: optax.GradientTransformation(*f(SGD, optax.sgd(0.05))),
    "scale_by_learning_rate": lambda f: f(0.1),
    "scale_by_muon": lambda f: optax.masked(f(weight_dimension_numbers=MUON), TABLE),
    "selective_transform": lambda f: f(SGD, freeze_mask=BIAS),
    "stateless": lambda f: f(lambda g, _: jax.tree.map(lambda x: 2 * x, g)),
    "stateless_with_tree_map": lambda f: f(lambda g, _: 2 * g),
}
# Public functions that the walk leaves out, and why.
SKIPPED = {
    "bias_correction": "takes arrays and returns them",
    "differentially_private_aggregate": "takes gradients of examples; tested below",
    "dpsgd": "takes gradients of examples; tested below",
    "lookahead": "takes pairs of parameters; tested below",
    "matrix_inverse_pth_root": "takes arrays and returns them",
    "measure_with_ema": "returns a measure, not updates; monitored below",
    "schedule_free_eval_params": "takes a state and returns parameters",
    "sigmoid_binary_cross_entropy": "is a loss",
    "update_infinity_moment": "takes arrays and returns them",
    "update_moment": "takes arrays and returns them",
    "update_moment_per_elem_norm": "takes arrays and returns them",
}


def public_functions():
    """Return what may make a transformation: it says so, or says nothing."""
    found = {}
    for module in (optax, optax.transforms, optax.contrib):
        for name, function in vars(module).items():
            if name.startswith("_") or inspect.isclass(function):
                continue
            if not callable(function):
                continue
            try:
                signature = inspect.signature(function)
            except ValueError:  # an alias of a type
                continue
            returned = signature.return_annotation
            if getattr(function, "__module__", "") == "typing":
                continue
            if returned is inspect.Signature.empty or "GradientT" in str(returned):
                found[name] = function
    return found


def required(function):
    parameters = inspect.signature(function).parameters.values()
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


FUNCTIONS = {k: f for k, f in public_functions().items() if k not in SKIPPED}
OUT_OF_RANGE_ID = {
    name: missing
    for name, function in FUNCTIONS.items()
    if name not in BUILT and (missing := [*{*required(function)} - {*GIVEN}])
}


def build(name, **options):
    function = FUNCTIONS[name]
    if name in BUILT and not options:
        return BUILT[name](function)
    given = {k: GIVEN[k] for k in required(function)}
    return function(**given | options)


def with_schedules():
    """Return each function that takes a learning rate, given a schedule."""
    schedule = optax.linear_schedule(0.1, 0.05, 4)
    for name, function in FUNCTIONS.items():
        parameter = inspect.signature(function).parameters.get("learning_rate")
        takes = parameter is not None and "Callable" in str(parameter.annotation)
        if takes and name not in OUT_OF_RANGE_ID:
            yield (
                f"{name}, scheduled",
                lambda name=name: build(name, learning_rate=schedule),
            )


MEASURE = optax.measure_with_ema(optax.tree.norm, 0.9)
INJECTED = optax.inject_hyperparams
# By name: what makes a transformation.
WALK = {
    **{k: functools.partial(build, k) for k in FUNCTIONS if k not in OUT_OF_RANGE_ID},
    **dict(with_schedules()),
    "MultiSteps": lambda: optax.MultiSteps(SGD, 2).gradient_transformation(),
    "adaptive_grad_clip, of all axes": lambda: optax.adaptive_grad_clip(0.1, axis=-1),
    "clip_by_global_norm, of small gradients": lambda: optax.clip_by_global_norm(1e6),
    "ema, without debiasing": lambda: optax.ema(0.9, debias=False),
    "flatten of clip": lambda: optax.flatten(optax.clip_by_global_norm(0.5)),
    "freeze the table": lambda: optax.freeze(TABLE),
    "inject_hyperparams, scheduled": lambda: INJECTED(optim.sgd)(
        lambda n: 0.1 / (n + 1)
    ),
    "inject_hyperparams of Optax's sgd": lambda: INJECTED(optax.sgd)(0.1),
    "inject_hyperparams of scale": lambda: INJECTED(optax.scale)(0.5),
    "mask for the bias": lambda: optax.masked(optax.adam(0.1), BIAS),
    "mask for the table": lambda: optax.masked(optax.scale(-0.1), TABLE),
    "monitor with EMA": lambda: optax.monitor({"norm": MEASURE}),
    "partition that freezes": lambda: optax.partition(
        {"rows": optax.set_to_zero(), "rest": optax.adam(0.1)}, LABELS
    ),
    "partition of Optax's": lambda: optax.partition(
        {"rows": optax.scale(-0.1), "rest": optax.adam(0.1)}, LABELS
    ),
    "rescaled by -1": lambda: optax.scale(-1),
    "rescaled by 2": lambda: optax.scale(2),
    "rescaled by an array": lambda: optax.scale(jnp.float32(0.5)),
    "sgd with momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "sgd with Nesterov's momentum": lambda: optax.sgd(0.1, 0.9, nesterov=True),
}
# They inject a momentum of 0, too, which keeps a velocity; rows keep it until they are
# named again, so that states differ as they should.
LAZY = {"inject_hyperparams", "inject_stateful_hyperparams"}
LAZY |= {"inject_hyperparams, scheduled"}
PLACES = {
    "alone": lambda tx: tx,
    "before": lambda tx: optax.chain(tx, SGD),
    "after": lambda tx: optax.chain(SGD, tx),
}


def sum_of_squares(params, obj_fn=None):  # noqa: ARG001 (Optax passes all of them on)
    """Return what optimizers that look for a step, or a curvature, may call."""
    return sum(jnp.vdot(x, x) for x in jax.tree.leaves(params))


def take_steps(optimizer, sparse, wrap=lambda f: f):
    """Return the parameters after each step, and the last state."""
    optimizer = optax.with_extra_args_support(optimizer)

    @wrap
    def step(params, state, value, gradient):
        given = {"value": value, "grad": gradient, "value_fn": sum_of_squares}
        given["obj_fn"] = sum_of_squares
        updates, state = optimizer.update(gradient, state, params, **given)
        return optax.apply_updates(params, updates), state

    params, after = start(), []
    state = optimizer.init(params)
    for value, gradient in gradients(sparse):
        params, state = step(params, state, value, gradient)
        after.append(params)
    return after, state


def run_case(name, place, wrap=lambda f: f):
    gradients(False)  # outside of what is traced

    def run(sparse):
        params, state = take_steps(PLACES[place](WALK[name]()), sparse, wrap)
        return params if name in LAZY else (params, state)

    return run


def test_every_public_transformation_is_known():
    assert not OUT_OF_RANGE_ID, "give these parameters a value, or skip the function"
    public = public_functions()
    assert len(FUNCTIONS) > 100
    assert {*BUILT, *SKIPPED} <= {*public}, "no longer public"


def test_the_gradient_of_the_walk_is_sparse_and_the_dense_one():
    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert is_rows(found[1]["table"])
        assert equals(densify(found), expected)
        assert not np.asarray(expected[1]["table"][0]).any()
        assert np.asarray(expected[1]["table"][4]).all()


def places_of(name):
    """Return where it stands; what has a schedule takes long, and stands alone."""
    return ["alone"] if name.endswith(", scheduled") else [*PLACES]


@pytest.mark.parametrize("name", WALK)
def test_a_transformation_equals_the_dense_one_or_raises(name):
    found = {place: outcome(run_case(name, place)) for place in places_of(name)}
    assert "wrong" not in found.values(), found
    trace_dense(run_case(name, "alone"))


# One of each kind; the walk itself is eager.
COMPILED = [
    "add_decayed_weights",
    "clip",
    "clip_by_global_norm",
    "conditionally_transform",
    "flatten",
    "keep_params_nonnegative",
    "masked",
    "MultiSteps",
    "normalize_by_update_norm",
    "rescaled by 2",
    "scale_by_schedule",
    "scale_by_sign",
    "sgd, scheduled",
    "snapshot",
    "trace",
    "zero_nans",
]


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_transformation_equals_the_dense_one_or_raises(name):
    assert outcome(run_case(name, "before", jax.jit)) != "wrong"


DECREASING = optax.linear_schedule(0.5, 0.1, 4)
# By name: made by this library's functions or by Optax's.
DROP_INS = {
    "scale": lambda x: x.scale(0.5),
    "scale by a negative number": lambda x: x.scale(-2),
    "scale_by_schedule": lambda x: x.scale_by_schedule(DECREASING),
    "scale_by_learning_rate": lambda x: x.scale_by_learning_rate(0.5),
    "scale_by_learning_rate, scheduled": lambda x: x.scale_by_learning_rate(DECREASING),
    "scale_by_learning_rate, upwards": lambda x: x.scale_by_learning_rate(
        0.5, flip_sign=False
    ),
    "clip_by_global_norm": lambda x: x.clip_by_global_norm(0.5),
    "clip_by_global_norm, of small gradients": lambda x: x.clip_by_global_norm(1e6),
}


@pytest.mark.parametrize("name", DROP_INS)
def test_drop_ins_equal_optax_with_dense_gradients(name):
    for place in PLACES:
        check_drop_in(name, place)


@pytest.mark.parametrize("name", DROP_INS)
def test_compiled_drop_ins_equal_optax_with_dense_gradients(name):
    check_drop_in(name, "before", jax.jit)


def check_drop_in(name, place, wrap=lambda f: f):
    ours, theirs = (PLACES[place](DROP_INS[name](x)) for x in (optim, optax))
    expected, state = take_steps(theirs, False, wrap)
    found, own = take_steps(ours, True, wrap)
    assert equals(found, expected)
    assert equals(own, state)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("bad", [1.0, np.nan])
def test_steps_of_rows_that_are_not_finite_are_skipped(bad, wrap):
    values = jnp.array([[1.0, 1.0], [bad, 1.0], [2.0, 2.0]], jnp.float32)
    rows = jbag.RowSparse.from_rows([4, 4, 7], values, V)
    inner = optim.adagrad(0.1)
    found = []
    for made, gradient in ((optim, rows), (optax, rows.todense())):
        optimizer, table = made.apply_if_finite(inner, 2), start()["table"]
        state = optimizer.init(table)
        for _ in range(2):
            updates, state = wrap(optimizer.update)(gradient, state, table)
            table = optax.apply_updates(table, updates)
        found.append((table, state))
    assert equals(*found)


# Around an optimizer for rows, these equal what they give for dense gradients.
WRAPPED = [
    pytest.param(
        "apply_if_finite",
        marks=pytest.mark.xfail(reason="Optax's raises; jbag.optim's is equal"),
    ),
    "chain",
    "freeze",
    "inject_hyperparams",
    "inject_hyperparams, scheduled",
    "mask for the bias",
    "masked",
    "multi_transform",
    "named_chain",
    "partition",
    "selective_transform",
    "with_extra_args_support",
]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_equal_the_dense_result(name, wrap):
    place = "before" if name in ("freeze", "mask for the bias") else "alone"
    check(run_case(name, place, wrap), must_equal=True)


@pytest.mark.parametrize("name", ["apply_if_finite", "keep_params_nonnegative", "clip"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_equal_the_dense_result_or_raise(
    name, place, bad
):
    # Row 4 has a good and a bad slot.
    rows = jnp.array([[1.0, 1.0], [bad, 1.0], [2.0, 2.0]], jnp.float32)
    rows = jbag.RowSparse.from_rows([4, 4, 7], rows, V)
    optimizer, params = PLACES[place](WALK[name]()), start()

    def step(sparse):
        gradient = {"table": rows, "bias": jnp.ones(D)}
        gradient = gradient if sparse else densify(gradient)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    check(step)


@pytest.mark.parametrize(
    "make", [lambda: optax.lookahead(SGD, 2, 0.5), lambda: optax.lookahead(SGD, 1, 0.5)]
)
def test_lookahead_equals_the_dense_result_or_raises(make):
    def steps(sparse):
        optimizer, params = make(), optax.LookaheadParams.init_synced(start())
        state = optimizer.init(params)
        for _, gradient in gradients(sparse):
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    check(steps)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.contrib.differentially_private_aggregate(0.5, 0.0, seed=0),
        lambda: optax.contrib.dpsgd(0.1, 0.5, 0.0, seed=0),
    ],
    ids=["differentially_private_aggregate", "dpsgd"],
)
def test_gradients_of_examples_equal_the_dense_result_or_raise(make):
    def step(sparse):
        optimizer, params = make(), start()["table"]
        gradient = stacked("vmap", sparse)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    stacked("vmap", False)  # outside of what is traced
    check(step)


def each(function):
    """Return a function that maps over the leaves of gradients."""
    return lambda *trees: jax.tree.map(function, *trees)


# Of two gradients; what each gives for arrays is what it must give for rows.
MAPS = {
    "twice": lambda a, _: each(lambda g: 2 * g)(a),
    "negative": lambda a, _: each(lambda g: -g)(a),
    "times a float": lambda a, _: each(lambda g: g * 0.1)(a),
    "times a number of its dtype": lambda a, _: each(
        lambda g: jnp.array(0.1, g.dtype) * g
    )(a),
    "times an array": lambda a, _: each(lambda g: g * jnp.float32(3))(a),
    "times a NumPy number": lambda a, _: each(lambda g: np.float32(3) * g)(a),
    "times a bool": lambda a, _: each(lambda g: g * True)(a),
    "divided": lambda a, _: each(lambda g: g / 2)(a),
    "divided by an integer": lambda a, _: each(lambda g: g // 1)(a),
    "add": lambda a, b: each(jnp.add)(a, b),
    "add itself": lambda a, _: each(jnp.add)(a, a),
    "subtract": lambda a, b: each(jnp.subtract)(a, b),
    "multiply": lambda a, b: each(jnp.multiply)(a, b),
    "maximum": lambda a, b: each(jnp.maximum)(a, b),
    "mean of two": lambda a, b: each(lambda x, y: (x + y) / 2)(a, b),
    "stacked, then summed": lambda a, b: each(lambda *x: jnp.stack(x).sum(0))(a, b),
    "sign": lambda a, _: each(jnp.sign)(a),
    "abs": lambda a, _: each(jnp.abs)(a),
    "clip": lambda a, _: each(lambda g: jnp.clip(g, -0.5, 0.5))(a),
    "square": lambda a, _: each(jnp.square)(a),
    "sqrt": lambda a, _: each(lambda g: jnp.sqrt(jnp.square(g)))(a),
    "power": lambda a, _: each(lambda g: g**2)(a),
    "mean": lambda a, _: each(jnp.mean)(a),
    "sum": lambda a, _: each(jnp.sum)(a),
    "max": lambda a, _: each(jnp.max)(a),
    "centred": lambda a, _: each(lambda g: g - g.mean())(a),
    "normalised": lambda a, _: each(lambda g: g / jnp.linalg.norm(g))(a),
    "astype": lambda a, _: each(lambda g: g.astype(jnp.float32))(a),
    "asarray": lambda a, _: each(lambda g: jnp.asarray(g, jnp.float32))(a),
    "astype integer": lambda a, _: each(lambda g: g.astype(jnp.int32))(a),
    "NumPy": lambda a, _: each(lambda g: 2 * np.asarray(g))(a),
    "zeros_like": lambda a, _: each(jnp.zeros_like)(a),
    "where, yes": lambda a, b: each(lambda x, y: jnp.where(True, x, y))(a, b),
    "where, no": lambda a, b: each(lambda x, y: jnp.where(False, x, y))(a, b),
    "where, zero": lambda a, _: each(lambda g: jnp.where(True, g, 0))(a),
    "where positive": lambda a, _: each(lambda g: jnp.where(g > 0, g, 0))(a),
    "nan_to_num": lambda a, _: each(jnp.nan_to_num)(a),
    "isfinite": lambda a, _: each(jnp.isfinite)(a),
    "round": lambda a, _: each(jnp.round)(a),
    "cond": lambda a, b: lax.cond(jnp.array(False), lambda: a, lambda: b),
    "stop_gradient": lambda a, _: lax.stop_gradient(a),
    "floating leaves doubled": lambda a, _: each(
        lambda g: 2 * g if jnp.issubdtype(g.dtype, jnp.floating) else g
    )(a),
    "noise": lambda a, _: each(
        lambda g: g + jax.random.normal(jax.random.key(0), g.shape)
    )(a),
    "tree.add": lambda a, b: optax.tree.add(a, b),
    "tree.add_scale": lambda a, b: optax.tree.add_scale(a, 0.5, b),
    "tree.sub": lambda a, b: optax.tree.sub(a, b),
    "tree.mul": lambda a, b: optax.tree.mul(a, b),
    "tree.scale": lambda a, _: optax.tree.scale(0.5, a),
    "tree.scale by an integer": lambda a, _: optax.tree.scale(2, a),
    "tree.where": lambda a, b: optax.tree.where(True, a, b),
    "tree.clip": lambda a, _: optax.tree.clip(a, -0.5, 0.5),
    "tree.cast": lambda a, _: optax.tree.cast(a, jnp.float32),
    "tree.norm": lambda a, _: optax.tree.norm(a),
    "tree.norm of order 1": lambda a, _: optax.tree.norm(a, ord=1),
    "tree.norm of order inf": lambda a, _: optax.tree.norm(a, ord=jnp.inf),
    "tree.sum": lambda a, _: optax.tree.sum(a),
    "tree.max": lambda a, _: optax.tree.max(a),
    "tree.vdot": lambda a, b: optax.tree.vdot(a, b),
    "tree.zeros_like": lambda a, _: optax.tree.zeros_like(a),
    "tree.update_moment": lambda a, b: optax.tree.update_moment(a, b, 0.9, 1),
    "tree.update_moment of order 2": lambda a, b: optax.tree.update_moment(
        a, b, 0.9, 2
    ),
    "global_norm": lambda a, _: optax.global_norm(a),
    "incremental_update": lambda a, b: optax.incremental_update(a, b, 0.1),
    "periodic_update": lambda a, b: optax.periodic_update(a, b, jnp.array(2), 2),
}


def pairs():
    """Return two gradients in each form: as they are, and with distinct rows."""
    pooled = [gradient["table"] for _, gradient in gradients(True)]
    return {"pooled": pooled, "coalesced": [rows.coalesce() for rows in pooled]}


def map_case(function, form, wrap=lambda f: f):
    rows = pairs()[form]
    dense = densify(rows)  # outside of what is traced
    return lambda sparse: wrap(function)(*(rows if sparse else dense))


def check_map(function):
    found = {form: outcome(map_case(function, form)) for form in pairs()}
    assert "wrong" not in found.values(), found
    trace_dense(map_case(function, "pooled"))


@pytest.mark.parametrize("name", MAPS)
def test_a_map_over_rows_equals_the_dense_one_or_raises(name):
    check_map(MAPS[name])


def test_rows_filled_with_zeros_move_no_row():
    rows = optax.tree.zeros_like(pairs()["pooled"][0])
    assert not np.asarray(rows.todense()).any()
    assert rows.num_rows == 0


COMPILED_MAPS = [
    *("twice", "times a number of its dtype", "add", "subtract", "abs", "where, no"),
    *("mean of two", "stacked, then summed", "zeros_like", "global_norm", "tree.sub"),
]


@pytest.mark.parametrize("name", COMPILED_MAPS)
def test_a_compiled_map_over_rows_equals_the_dense_one_or_raises(name):
    assert outcome(map_case(MAPS[name], "pooled", jax.jit)) != "wrong"


# Functions of a leaf that move numbers, without arithmetic.
MOVES = {
    "first row": lambda g: g[0],
    "half of the rows": lambda g: g[: g.shape[0] // 2],
    "transpose": jnp.transpose,
    "ravel": jnp.ravel,
    "sort": lambda g: jnp.sort(g, 0),
    "tile": lambda g: jnp.tile(g, (2, 1)),
    "concatenate": lambda g: jnp.concatenate([g, g]),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_map_that_moves_numbers_equals_the_dense_one_or_raises(name):
    check_map(lambda a, _: each(MOVES[name])(a))


# Functions of a leaf that keep its shape, without arithmetic.
KEEP_SHAPES = {
    "flip": jnp.flip,
    "roll": lambda g: jnp.roll(g, 1),
    "roll of an axis": lambda g: jnp.roll(g, 1, 0),
    "set a row": lambda g: jnp.asarray(g).at[0].set(jnp.asarray(g)[1]),
    "ones_like": jnp.ones_like,
    "full_like": lambda g: jnp.full_like(g, 3),
    "permute": lambda g: jax.random.permutation(jax.random.key(0), g),
}


@pytest.mark.parametrize("name", KEEP_SHAPES)
def test_a_map_that_keeps_shapes_equals_the_dense_one_or_raises(name):
    check_map(lambda a, _: each(KEEP_SHAPES[name])(a))


def floating_only(function):
    return each(lambda g: function(g) if jnp.issubdtype(g.dtype, jnp.floating) else g)


# Functions of the floating leaves, as a filter picks them.
FILTERED = {
    "clip": lambda g: jnp.clip(g, -0.5, 0.5),
    "sign": jnp.sign,
    "abs": jnp.abs,
    "square": jnp.square,
    "round": jnp.round,
    "sort": jnp.sort,
    "positive": lambda g: jnp.maximum(g, 0),
    "plus one": lambda g: g + 1,
    "normalised": lambda g: g / jnp.linalg.norm(g),
    "noise": lambda g: g + jax.random.normal(jax.random.key(0), g.shape),
    "flip": jnp.flip,
    "ones_like": jnp.ones_like,
    "tanh": jnp.tanh,
}


@pytest.mark.parametrize("name", FILTERED)
def test_a_map_over_floating_leaves_equals_the_dense_one_or_raises(name):
    check_map(lambda a, _: floating_only(FILTERED[name])(a))


LINEAR = {
    "scale": lambda g: -0.001 * g,
    "zeros": jnp.zeros_like,
    "times zero": lambda g: 0.0 * g,
    "there and back": lambda g: g.astype(jnp.float16).astype(jnp.float32),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_map_over_floating_leaves_equals_the_dense_one(name, wrap):
    rows = pairs()["pooled"][0]
    function = LINEAR[name]
    found = wrap(floating_only(function))(rows).todense()
    np.testing.assert_allclose(found, function(rows.todense()), rtol=1e-3, atol=1e-3)


# Traced, the guard can't raise.
POISONS = {
    "flip": each(jnp.flip),
    "roll": each(lambda g: jnp.roll(g, 1)),
    **{f"{name}, filtered": floating_only(f) for name, f in FILTERED.items()},
}


@pytest.mark.parametrize("function", POISONS.values(), ids=POISONS.keys())
def test_what_raises_gives_nan_where_it_is_compiled(function):
    rows = pairs()["pooled"][0]
    changed = jax.jit(lambda rows: function(rows).todense())(rows)
    assert np.isnan(changed).any(1).sum() == np.asarray(rows.todense()).any(1).sum()


def rows_of_every_layout():
    """Return rows whose terms hold each kind of array, by a name of it."""
    table, weights = start()["table"], jnp.array([0.5, 2.0, 0.0, 1.0, 3.0, 1.0])
    ids, ends = jnp.array([3, 0, 3, 12, 5, 7]), jnp.array([0, 2, 2, 5])
    ragged = functools.partial(
        jbag.embedding_bag, offsets=ends, include_last_offset=True, sparse=True
    )
    pools = {
        "ragged": functools.partial(ragged, mode="mean"),
        "weighted": functools.partial(ragged, mode="sum", weights=weights),
        "maximum": functools.partial(ragged, mode="max"),
        "padded": functools.partial(ragged, mode="sum", padding_idx=0),
        "without bags": functools.partial(
            ragged, mode="sum", offsets=jnp.zeros(1, int)
        ),
    }
    rows = {
        name: jbag.grad(lambda t, pool=pool: pool(t, ids).sum())(table)
        for name, pool in pools.items()
    }
    batch = jnp.stack([jnp.array([[1, 2]]), jnp.array([[2, 12]])])
    stacked = jax.vmap(
        jbag.grad(lambda t, ids: jbag.embedding_bag(t, ids, sparse=True).sum()),
        in_axes=(None, 0),
    )
    return rows | {
        "rectangular": pairs()["pooled"][0],
        "coalesced": rows["ragged"].coalesce(),
        "a batch": stacked(table, batch),
        "rows": jbag.RowSparse.from_rows([12, 12], jnp.ones((2, D)), V),
    }


FILLED = {name: each(KEEP_SHAPES[name]) for name in ("ones_like", "full_like")} | {
    "full_like, below zero": each(lambda g: jnp.full_like(g, -3)),
}


@pytest.mark.parametrize("layout", rows_of_every_layout())
@pytest.mark.parametrize("fill", FILLED.values(), ids=FILLED.keys())
def test_rows_that_a_compiled_function_fills_move_a_row_to_nan(fill, layout):
    rows = rows_of_every_layout()[layout]
    changed = jax.jit(lambda rows: fill(rows).sum().todense())(rows)
    assert np.isnan(changed).any() == (layout != "without bags")


MESH_SPECS = {
    "rows": P("x", None),
    "columns": P(None, "x"),
    "replicated": P(),
    "whole": jbag.sharding.Whole("x", 4),
}


@pytest.mark.parametrize("spec", MESH_SPECS.values(), ids=MESH_SPECS.keys())
def test_rows_over_a_mesh_that_a_compiled_function_fills_move_a_row_to_nan(spec):
    collection = jbag.EmbeddingBagCollection(
        {"table": jbag.Table(V, 4)},
        {"ids": jbag.Feature("table")},
        specs={"embedding": spec},
        mesh=make_mesh(),
        sparse=True,
    )
    blocks = [[[1, 2], [3]], [[], [4, 4]], [[5], [6, 0]], [[0], []]]
    bags = [jbag.Bags.from_lists(lists, capacity=4) for lists in blocks]
    batch = {"ids": jax.tree.map(lambda *x: jnp.stack(x), *bags)}

    @jax.jit
    def gradient(key):
        variables = collection.init(key, batch)
        loss = lambda variables: collection.apply(variables, batch)["ids"].sum()
        return jbag.grad(loss)(variables)

    @jax.jit
    def fill(tree):
        return jax.tree.map(
            lambda rows: each(jnp.ones_like)(rows).todense(),
            tree,
            is_leaf=lambda x: isinstance(x, jbag.RowSparse),
        )

    (dense,) = jax.tree.leaves(fill(gradient(jax.random.key(0))))
    assert np.isnan(dense).any()


def test_steps_of_rows_that_a_compiled_function_changed_are_nan():
    def step(table, rows):
        updates, _ = SGD.update(floating_only(jnp.sign)(rows), SGD.init(table), table)
        return optax.apply_updates(table, updates)

    rows, table = pairs()["pooled"][0], start()["table"]
    with pytest.raises(ValueError, match=r"isn't linear .* jbag\.optim"):
        step(table, rows)
    assert np.isnan(jax.jit(step)(table, rows)).any()


def test_rows_pass_through_compiled_functions_with_checks_for_nan():
    rows = pairs()["pooled"][0]
    with jax.debug_nans(True), jax.debug_infs(True):
        assert is_close(jax.jit(lambda x: x)(rows).todense(), rows.todense())


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_zeroing_the_nans_of_rows_raises(wrap):
    values = jnp.array([[1.0, 1.0], [np.nan, 1.0], [2.0, 2.0]], jnp.float32)
    rows = jbag.RowSparse.from_rows([4, 4, 7], values, V)
    zero = optax.zero_nans()
    with pytest.raises(TypeError, match="float0"):
        wrap(zero.update)(rows, zero.init(start()["table"]))


def test_the_global_norm_of_rows_is_that_of_the_dense_gradient():
    for rows in pairs().values():
        assert is_close(optim.global_norm(rows), optax.tree.norm(densify(rows)))


def stacked_by_vmap(sparse):
    gradient = (jbag if sparse else jax).grad(loss_of(sparse))
    return jax.vmap(gradient, in_axes=(None, 0))(start(), jnp.stack(BATCHES))["table"]


def stacked_by_scan(sparse):
    gradient = (jbag if sparse else jax).grad(loss_of(sparse))
    body = lambda params, ids: (params, gradient(params, ids))
    return lax.scan(body, start(), jnp.stack(BATCHES))[1]["table"]


STACKED = {"vmap": stacked_by_vmap, "scan": stacked_by_scan}


@functools.cache
def stacked(kind, sparse):
    return jax.jit(lambda: STACKED[kind](sparse))()


REDUCTIONS = {
    "sum": lambda g: jnp.sum(g, axis=0),
    "mean": lambda g: jnp.mean(g, axis=0),
    "sum of all": jnp.sum,
    "max": lambda g: jnp.max(g, axis=0),
    "first": lambda g: g[0],
    "last of the reverse": lambda g: g[::-1][-1],
    "cumsum": lambda g: jnp.cumsum(g, 0),
    "difference": lambda g: g[0] - g[1],
}


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_of_stacked_rows_equals_the_dense_one_or_raises(name, kind):
    stacked(kind, False)
    check(lambda sparse: each(REDUCTIONS[name])(stacked(kind, sparse)))


@pytest.mark.parametrize("kind", STACKED)
def test_stacked_rows_sum_to_one_and_are_multiplied_out(kind):
    rows, expected = stacked(kind, True), stacked(kind, False)
    one, every = rows.sum(axis=0), rows.todense()
    compiled = jax.jit(lambda rows: (rows.sum(axis=0), rows.todense()))(rows)
    assert equals(densify(compiled), (expected.sum(0), expected))
    assert is_rows(one)
    assert one.shape == (V, D)
    assert every.shape == (2, V, D)
    assert equals((one.todense(), every), (expected.sum(0), expected))
    updates, _ = SGD.update(one, SGD.init(start()["table"]), start()["table"])
    moved = optax.apply_updates(start()["table"], updates)
    assert is_close(moved, start()["table"] - 0.1 * expected.sum(0))


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.parametrize("place", PLACES)
def test_an_optimizer_of_stacked_rows_equals_the_dense_one_or_raises(kind, place):
    optimizer = PLACES[place](optim.scale(0.5))
    tables = jnp.stack([start()["table"]] * 2)

    def step(params, sparse):
        gradient = stacked(kind, sparse)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    stacked(kind, False)
    check(functools.partial(step, tables))


def exchange(g):
    return lax.ppermute(g, "x", [(0, 1), (1, 0), (2, 3), (3, 2)])


COLLECTIVES = {
    "psum": lambda g: lax.psum(g, "x"),
    "pmean": lambda g: lax.pmean(g, "x"),
    "pmax": lambda g: lax.pmax(g, "x"),
    "pmin": lambda g: lax.pmin(g, "x"),
    "psum of each leaf": each(lambda g: lax.psum(g, "x")),
    "psum of halves": each(lambda g: lax.psum(g * 0.5, "x")),
    "psum_scatter": lambda g: lax.psum_scatter(g, "x", tiled=True),
    "all_gather": lambda g: lax.all_gather(g, "x"),
    "all_gather, then sum": lambda g: each(lambda g: g.sum(0))(lax.all_gather(g, "x")),
    "all_to_all": lambda g: lax.all_to_all(g, "x", 0, 0, tiled=True),
    "ppermute": exchange,
}
IDS = jnp.asarray(np.random.default_rng(1).integers(1, V, (4, 2, 3)), jnp.int32)


def under_shard_map(collective, sparse, checked=True, loss=small_loss):
    """Return what each device has of the collective of its gradient, stacked."""
    mesh = make_mesh()

    def local(params, ids):
        if checked:
            params = lax.pcast(params, "x", to="varying")
        local_loss = loss_of(sparse, loss)
        gradient = (jbag if sparse else jax).grad(local_loss)(params, ids[0])
        return jax.tree.map(lambda x: x[None], densify(collective(gradient)))

    specs = {"in_specs": (P(), P("x")), "out_specs": P("x"), "check_vma": checked}
    return jax.jit(jax.shard_map(local, mesh=mesh, **specs))(start(), IDS)


def under_vmap(collective, sparse, loss=small_loss):
    def local(ids):
        gradient = (jbag if sparse else jax).grad(loss_of(sparse, loss))(start(), ids)
        return densify(collective(gradient))

    return jax.vmap(local, axis_name="x")(IDS)


def under_pmap(collective, sparse, loss=small_loss):
    def local(ids):
        gradient = (jbag if sparse else jax).grad(loss_of(sparse, loss))(start(), ids)
        return densify(collective(gradient))

    return jax.pmap(local, axis_name="x", devices=some_devices(4))(IDS)


def of_table(collective):
    """Return the collective for the gradient of the table alone."""
    return lambda gradient: collective(gradient["table"])


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("under", [under_shard_map, under_vmap])
def test_a_collective_equals_the_dense_one_or_raises(under, name):
    check(functools.partial(under, of_table(COLLECTIVES[name])))


@pytest.mark.parametrize("name", ["psum", "pmean", "pmax"])
@pytest.mark.parametrize(
    "under", [under_pmap, functools.partial(under_shard_map, checked=False)]
)
def test_other_ways_to_map_an_axis_equal_the_dense_result_or_raise(under, name):
    check(functools.partial(under, of_table(COLLECTIVES[name])))


@pytest.mark.parametrize("name", ["psum", "pmean"])
@pytest.mark.parametrize(
    "under",
    [
        under_shard_map,
        functools.partial(under_shard_map, checked=False),
        under_vmap,
        under_pmap,
    ],
    ids=["shard_map", "shard_map, unchecked", "vmap", "pmap"],
)
def test_rows_sum_over_a_mapped_axis_as_dense_gradients_do(under, name):
    expected = under(lambda g: getattr(lax, name)(g, "x"), False, loss=loss)
    total = lambda g: getattr(jbag.sparse, name)(g, "x")
    assert equals(under(total, True, loss=loss), expected)


def test_data_parallel_steps_equal_those_of_dense_gradients():
    mesh = make_mesh()

    def train(sparse):
        differentiate = (jbag if sparse else jax).value_and_grad
        total = jbag.sparse.pmean if sparse else lax.pmean

        def step(params, ids):
            value, gradient = differentiate(loss_of(sparse))(params, ids[0])
            gradient = total(gradient, "x")
            updates, _ = SGD.update(gradient, SGD.init(params), params)
            params = optax.apply_updates(params, updates)
            return params, lax.pmean(value, "x")[None]

        specs = {"in_specs": (P(), P("x")), "out_specs": (P(), P("x"))}
        step = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))
        params, values = start(), []
        for ids in (IDS, IDS[::-1], (IDS + 1) % V):
            params, value = step(params, ids)
            values.append(value)
        return params, values

    assert equals(train(True), train(False))


def print_counts():
    """Print how many cases are equal, raise, and are wrong, and which are wrong."""
    groups = {
        "walk": [
            (f"{name}, {place}", run_case(name, place))
            for name in WALK
            for place in places_of(name)
        ],
        "maps": [
            (f"{name}, {form}", map_case(function, form))
            for name, function in MAPS.items()
            for form in ("pooled", "coalesced")
        ],
        "moves": [
            (f"{name}, {form}", map_case(lambda a, _, f=f: each(f)(a), form))
            for name, f in MOVES.items()
            for form in ("pooled", "coalesced")
        ],
        "collectives": [
            (f"{name}, {under.__name__}", functools.partial(under, of_table(f)))
            for name, f in COLLECTIVES.items()
            for under in (under_shard_map, under_vmap)
        ],
    }
    for group, cases in groups.items():
        counts, kinds = collections.Counter(), collections.Counter()
        wrong, equal = [], []
        for name, case in cases:
            found = outcome(case)
            if isinstance(found, Exception):
                kinds[type(found).__name__] += 1
                kinds["of which name jbag"] += "jbag" in str(found)
                found = "raises"
            counts[found] += 1
            if found == "wrong":
                wrong.append(name)
            if found == "equal":
                equal.append(name)
        print(f"{group}: {dict(counts)}\n  errors: {dict(kinds)}")
        print(f"  equal: {equal}\n  wrong: {wrong}")


if __name__ == "__main__":
    print_counts()

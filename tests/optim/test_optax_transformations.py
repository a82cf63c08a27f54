"""Every public transformation of Optax equals the dense one, or raises.

Nothing of jbag is used but its public functions.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_counterpart import densify, is_rows
from optax_walk import (
    PLACES,
    SGD,
    D,
    V,
    check,
    equals,
    gradients,
    outcome,
    stacked,
    start,
    trace_dense,
)
from slow import slow

import jbag
from jbag import optim

pytestmark = pytest.mark.standard_promotion
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


# One of each kind.
KINDS = [
    "adam",
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


@pytest.mark.parametrize(
    "name", [*KINDS, *slow(*(name for name in WALK if name not in KINDS))]
)
def test_a_transformation_equals_the_dense_one_or_raises(name):
    found = outcome(run_case(name, "alone"))
    assert found != "wrong"
    trace_dense(run_case(name, "alone"))


# What has a schedule takes long, and stands alone.
UNSCHEDULED = [name for name in WALK if not name.endswith(", scheduled")]


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSCHEDULED)
def test_a_chained_transformation_equals_the_dense_one_or_raises(name):
    # Before another, most raise as they do alone.
    places = ("before", "after") if name in KINDS else ("after",)
    found = {place: outcome(run_case(name, place)) for place in places}
    assert "wrong" not in found.values(), found


@pytest.mark.parametrize("name", KINDS)
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

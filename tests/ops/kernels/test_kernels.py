"""Which kernel an implementation's name, or None, means on a platform."""

import dataclasses
import functools
import re
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import MODES, assert_close

import jbag
from jbag.ops import _primitive, kernels
from jbag.ops.kernels import KERNELS, Kernel, check_implementation, choose, xla

PLATFORMS = ("cpu", "cuda", "tpu")


def test_none_works_on_every_platform():
    for platform in (*PLATFORMS, "rocm", "another", None):
        for exported in (False, True):
            kernel = choose(None, platform, exported=exported)
            assert kernel.runs_on(platform)
            assert kernel.missing is None


def test_the_reference_runs_everywhere():
    for platform in (*PLATFORMS, "rocm", "another", None):
        assert choose("xla", platform).operations is xla


def test_a_platform_gets_the_first_that_runs_on_it(monkeypatch):
    native = Kernel(xla, platforms=("tpu",))
    monkeypatch.setattr(kernels, "KERNELS", {"native": native, **KERNELS})
    assert choose(None, "tpu") is native
    assert choose(None, "another") is KERNELS["xla"]
    assert choose("xla", "tpu") is KERNELS["xla"]
    assert kernels.special_platforms() >= {"cpu", "tpu"}


def test_a_kernel_is_the_default_where_it_is_preferred(monkeypatch):
    for platform in ("cuda", "rocm"):
        assert choose(None, platform) is KERNELS["xla_gpu"]
    assert choose(None, "tpu") is KERNELS["xla"]
    assert choose("xla_gpu", "tpu") is KERNELS["xla_gpu"]
    by_name = Kernel(xla, platforms=("tpu",), preferred_on=())
    monkeypatch.setattr(kernels, "KERNELS", {"native": by_name, **KERNELS})
    assert choose(None, "tpu") is KERNELS["xla"]
    assert choose("native", "tpu") is by_name


def test_a_cpu_gets_its_own_kernel(require):
    require("cpu")
    assert choose(None, "cpu") is KERNELS["cpu"]
    assert choose("xla", "cpu") is KERNELS["xla"]


def test_an_exported_program_gets_a_portable_kernel_unless_it_names_one(monkeypatch):
    native = Kernel(xla, platforms=("tpu",))
    monkeypatch.setattr(kernels, "KERNELS", {"native": native, **KERNELS})
    for platform in ("cpu", "tpu", None):
        assert choose(None, platform, exported=True) is KERNELS["xla"]
    assert choose(None, "cuda", exported=True) is KERNELS["xla_gpu"]
    assert choose("native", "tpu", exported=True) is native
    portable = Kernel(xla, platforms=("tpu",), portable=True)
    monkeypatch.setattr(kernels, "KERNELS", {"native": portable, **KERNELS})
    assert choose(None, "tpu", exported=True) is portable


def test_a_named_kernel_is_that_one_or_an_error(monkeypatch):
    native = Kernel(xla, platforms=("cpu",))
    monkeypatch.setattr(kernels, "KERNELS", {"native": native, **KERNELS})
    check_implementation("native")
    with pytest.raises(ValueError, match=r"'native' runs on \('cpu',\), not on tpu"):
        choose("native", "tpu")


def test_a_kernel_gets_no_more_rows_than_it_takes(monkeypatch):
    native = Kernel(xla, platforms=("tpu",), max_rows=10)
    monkeypatch.setattr(kernels, "KERNELS", {"native": native, **KERNELS})
    assert choose(None, "tpu", rows=10) is native
    assert choose(None, "tpu", rows=11) is KERNELS["xla"]
    assert choose("native", "tpu", rows=10) is native
    message = "`implementation` 'native' takes tables of at most 10 rows; got 11"
    with pytest.raises(ValueError, match=message):
        choose("native", "tpu", rows=11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("differentiate", [False, True])
def test_the_cpu_kernel_takes_tables_that_32_bits_count(differentiate, require):
    require("cpu")
    ids = jnp.zeros((3, 2), jnp.int64)

    def lower(rows, implementation):
        pool = lambda t: jbag.embedding_bag(
            t, ids, mode="sum", implementation=implementation
        )
        loss = jax.grad(lambda t: pool(t).sum()) if differentiate else pool
        return jax.jit(loss).lower(jax.ShapeDtypeStruct((rows, 1), jnp.bfloat16))

    assert "@jbag_cpu_spmm" in lower(2**31 - 1, None).as_text()
    assert "@jbag_cpu_spmm" not in lower(2**31, None).as_text()
    message = "`implementation` 'cpu' takes tables of at most 2147483647 rows"
    with pytest.raises(ValueError, match=message):
        lower(2**31, "cpu")


REASON = "no working C++ compiler was found when it was installed"


@pytest.fixture
def without_cpu_kernel(monkeypatch):
    """An installation that lacks the CPU kernel."""
    missing = dataclasses.replace(KERNELS["cpu"], missing=REASON)
    monkeypatch.setattr(kernels, "KERNELS", KERNELS | {"cpu": missing})


@pytest.mark.usefixtures("without_cpu_kernel")
def test_a_missing_kernel_is_an_error_that_says_why():
    message = f"`implementation` 'cpu' is not available: {re.escape(REASON)}"
    with pytest.raises(ValueError, match=message):
        check_implementation("cpu")
    with pytest.raises(ValueError, match=message):
        jbag.embedding_bag(jnp.ones((3, 2)), [[0, 1]], implementation="cpu")


@pytest.mark.usefixtures("without_cpu_kernel")
def test_none_does_without_a_missing_kernel():
    assert choose(None, "cpu") is KERNELS["xla"]
    # Of shapes that no other test has: programs that are compiled are kept by them.
    table = np.ones((3, 41), np.float32)
    pool = lambda t: jbag.embedding_bag(t, [[0, 1], [2, 2]], mode="sum")
    value, pullback = jax.vjp(pool, table)
    np.testing.assert_array_equal(value, 2 * np.ones((2, 41)))
    (gradient,) = pullback(jnp.ones_like(value))
    np.testing.assert_array_equal(gradient, [[1] * 41, [1] * 41, [2] * 41])
    assert "custom_call @jbag" not in jax.jit(pool).lower(table).as_text()


def test_an_unknown_name_is_an_error_that_lists_the_known():
    for name in ("triton", ""):
        known = "'cpu', 'cuda', 'sparsecore', 'tensorcore', 'xla_gpu', 'xla'"
        message = f"must be None or one of {known}; got {name!r}"
        with pytest.raises(ValueError, match=message):
            check_implementation(name)


def test_the_kernel_is_chosen_at_lowering_not_at_tracing():
    table = jnp.ones((3, 2))
    jaxpr = str(jax.make_jaxpr(lambda t: jbag.embedding_bag(t, [[0, 1]]))(table))
    assert "jbag_spmm" in jaxpr
    assert "implementation=None" in jaxpr


def test_a_primitive_is_lowered_to_the_kernel_of_its_platform(monkeypatch):
    calls = []

    def spmm(*operands, **options):
        calls.append(operands)
        return xla.spmm(*operands, **options)

    operations = types.SimpleNamespace(**vars(xla) | {"spmm": spmm})
    native = Kernel(operations, platforms=(jax.default_backend(),))
    monkeypatch.setattr(kernels, "KERNELS", {"native": native, **KERNELS})
    primitive = _primitive.define(
        "spmm", dense=["rows"], has_coefficients=True, outputs=["bags"]
    )
    operands = jnp.ones((3, 2)), jnp.array([[0, 1]])
    bind = lambda **params: jax.jit(
        functools.partial(
            primitive.bind,
            pad_id=None,
            average=None,
            dtype=jnp.dtype("float32"),
            **params,
        )
    )
    for implementation, expected in (("xla", 0), (None, 1), ("native", 2)):
        pool = bind(implementation=implementation)
        np.testing.assert_array_equal(pool(*operands), [[2, 2]])
        assert len(calls) == expected
    everywhere = jax.export.export(bind(implementation=None), platforms=PLATFORMS)
    assert everywhere(*operands).platforms == PLATFORMS
    assert len(calls) == 2
    named = bind(implementation="native")
    jax.export.export(named)(*operands)
    assert len(calls) == 3
    elsewhere = "tpu" if jax.default_backend() == "cpu" else "cpu"
    expected = rf"'native' runs on \('{jax.default_backend()}',\), not on {elsewhere}"
    with pytest.raises(ValueError, match=expected):
        jax.export.export(named, platforms=(elsewhere,))(*operands)


@pytest.mark.parametrize("mode", MODES)
def test_none_gives_what_the_best_kernel_gives(mode):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(9, 5)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 9, (6, 40)), jnp.int32)
    best = choose(None, jax.default_backend())
    (name,) = (name for name, kernel in KERNELS.items() if kernel is best)

    def results(implementation):
        pool = lambda t: jbag.embedding_bag(
            t, ids, mode=mode, implementation=implementation
        )
        value, pullback = jax.vjp(pool, table)
        return value, *pullback(jnp.ones_like(value))

    # The same bits, as they come from the same kernel.
    jax.tree.map(np.testing.assert_array_equal, results(None), results(name))
    jax.tree.map(assert_close, results(None), results("xla"))

"""Which kernel an implementation's name, or None, means on a platform."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jbag
from jbag import _kernels, _primitive
from jbag._kernels import KERNELS, Kernel, check_implementation, choose, xla


def test_none_works_on_every_platform():
    for platform in ("cpu", "cuda", "rocm", "tpu", "another", None):
        assert choose(None, platform).runs_on(platform)


def test_the_reference_runs_everywhere():
    for platform in ("cpu", "cuda", "rocm", "tpu", "another", None):
        assert choose("xla", platform).operations is xla


def test_a_platform_gets_the_first_that_runs_on_it(monkeypatch):
    native = Kernel(xla, platforms=("cpu",))
    monkeypatch.setattr(_kernels, "KERNELS", {"native": native, **KERNELS})
    assert choose(None, "cpu") is native
    assert choose(None, "tpu") is KERNELS["xla"]
    assert choose("xla", "cpu") is KERNELS["xla"]
    assert _kernels.special_platforms() >= {"cpu"}


def test_a_named_kernel_is_that_one_or_an_error(monkeypatch):
    native = Kernel(xla, platforms=("cpu",))
    monkeypatch.setattr(_kernels, "KERNELS", {"native": native, **KERNELS})
    check_implementation("native")
    with pytest.raises(ValueError, match=r"'native' runs on \('cpu',\), not on tpu"):
        choose("native", "tpu")


def test_an_unknown_name_is_an_error_that_lists_the_known():
    for name in ("triton", ""):
        with pytest.raises(ValueError, match="must be None or one of 'xla'"):
            check_implementation(name)


def test_the_kernel_is_chosen_at_lowering_not_at_tracing():
    table = jnp.ones((3, 2))
    jaxpr = str(jax.make_jaxpr(lambda t: jbag.embedding_bag(t, [[0, 1]]))(table))
    assert "jbag_product" in jaxpr
    assert "implementation=None" in jaxpr


def test_a_primitive_is_lowered_to_the_kernel_of_its_platform(monkeypatch):
    calls = []

    class Native:
        @staticmethod
        def product(*operands):
            calls.append(operands)
            return xla.product(*operands)

    native = Kernel(Native, platforms=(jax.default_backend(),))
    monkeypatch.setattr(_kernels, "KERNELS", {"native": native, **KERNELS})
    primitive = _primitive.define(
        "product", dense=["rows"], coefficients=True, outputs=["bags"]
    )
    operands = jnp.ones((3, 2)), jnp.array([[0, 1]])
    for implementation, expected in (("xla", 0), (None, 1), ("native", 2)):
        pool = jax.jit(functools.partial(primitive.bind, implementation=implementation))
        np.testing.assert_array_equal(pool(*operands), [[2, 2]])
        assert len(calls) == expected
    best = jax.jit(functools.partial(primitive.bind, implementation=None))
    everywhere = jax.export.export(best, platforms=("cpu", "cuda", "tpu"))
    assert everywhere(*operands).platforms == ("cpu", "cuda", "tpu")
    named = jax.jit(functools.partial(primitive.bind, implementation="native"))
    elsewhere = "tpu" if jax.default_backend() == "cpu" else "cpu"
    expected = rf"'native' runs on \('{jax.default_backend()}',\), not on this platform"
    with pytest.raises(ValueError, match=expected):
        jax.export.export(named, platforms=(elsewhere,))(*operands)


def test_none_gives_what_the_best_kernel_gives(implementation):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(9, 5)), jnp.float32)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 9, (6, 4)), jnp.int32)
    for mode in ("sum", "mean", "sqrtn", "max", "min"):
        best = jbag.embedding_bag(table, ids, mode=mode)
        named = jbag.embedding_bag(table, ids, mode=mode, implementation=implementation)
        np.testing.assert_allclose(best, named, rtol=1e-6)

"""Which kernel an implementation's name, or None, means on a platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbag
from jbag import _kernels
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


def test_none_gives_what_the_best_kernel_gives(implementation):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(9, 5)), jnp.float32)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 9, (6, 4)), jnp.int32)
    for mode in ("sum", "mean", "sqrtn", "max", "min"):
        best = jbag.embedding_bag(table, ids, mode=mode)
        named = jbag.embedding_bag(table, ids, mode=mode, implementation=implementation)
        np.testing.assert_allclose(best, named, rtol=1e-6)

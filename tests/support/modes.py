"""Every mode in one compiled program, for one kernel."""

import functools

import jax
from oracle import MODES

import jbag

# Of sums and of extrema one each: enough where modes share what is tested.
TWO = ("mean", "max")
PAIRS = (TWO, ("sum", "min"), ("sqrtn", "max"))

# What tests/conftest.py switches off.
_AT_ITS_BEST = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
if jax.__version_info__ < (0, 11):
    _AT_ITS_BEST["xla_cpu_use_fusion_emitters"] = True
_OPTIONS = _AT_ITS_BEST if jax.default_backend() == "cpu" else {}


def _run(table, weights, ids, offsets, cotangent, options, modes):
    def results(mode):
        value, pullback = jax.vjp(
            lambda table, weights: jbag.embedding_bag(
                table, ids, offsets, mode=mode, weights=weights, **dict(options)
            ),
            table,
            weights,
        )
        return value, *pullback(cotangent.astype(value.dtype))

    return {mode: results(mode) for mode in modes}


_jit = functools.partial(jax.jit, _run, static_argnames=("options", "modes"))
_run_optimized, _run_quickly = _jit(compiler_options=_OPTIONS), _jit()


def every_mode(
    table,
    weights,
    ids,
    offsets,
    cotangent,
    modes=MODES,
    optimized=False,
    **options,
):
    """Return, by mode, the value and the gradients to table and weights.

    What has the same shapes and options compiles once.
    """
    run = _run_optimized if optimized else _run_quickly
    options = tuple(options.items())
    return run(table, weights, ids, offsets, cotangent, options, modes)

"""Every mode in one compiled program, for one kernel."""

import functools

import jax
from oracle import MODES

import jbag


def _is_known(option):
    """Whether this XLA takes an option to its compiler; they come and go."""
    try:
        jax.jit(lambda: 0, compiler_options=dict([option]))()
    except jax.errors.JaxRuntimeError:
        return False
    return True


# For tests of what a program computes, where others hold what XLA makes of it at its
# best: less than half the time to compile on a CPU. The C++ kernel is the same either
# way. Elsewhere the portable kernel is all there is, and is tested as users have it.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
QUICKLY = (
    dict(filter(_is_known, QUICKLY.items())) if jax.default_backend() == "cpu" else {}
)


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
_run_optimized, _run_quickly = _jit(), _jit(compiler_options=QUICKLY)


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

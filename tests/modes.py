"""Every mode in one compiled program, for one kernel."""

import functools

import jax
from oracle import MODES

import jbag


@functools.partial(jax.jit, static_argnames=("options", "modes"))
def run(table, weights, ids, offsets, cotangent, options, modes):
    """Return, by mode, the value and the gradients to table and weights."""

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


def every_mode(table, weights, ids, offsets, cotangent, modes=MODES, **options):
    """Run `modes`; what has the same shapes and options compiles once."""
    options = tuple(options.items())
    return run(table, weights, ids, offsets, cotangent, options, modes)

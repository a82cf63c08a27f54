"""`catch_up` for NNX modules and optimizers."""

from __future__ import annotations

from typing import Any

from flax import nnx

from jbag.optim import catch_up as catch_up_params


def catch_up(
    model: nnx.Module, optimizer: nnx.Optimizer[Any], reads: Any = None
) -> None:
    """Apply the steps that rows have missed: `jbag.optim.catch_up`, in place.

    Args:
      model: the module.
      optimizer: its optimizer, of `jbag.optim` with `lazy=False`.
      reads: a gradient, as `grad` returns it, for the rows that it names; None for all.

    Raises:
      TypeError, ValueError: as `jbag.optim.catch_up`.

    Example:
      >>> from flax import nnx
      >>> bag = jbag.nnx.EmbeddingBag(9, 2, sparse=True, rngs=nnx.Rngs(0))
      >>> adam = jbag.optim.adam(0.1, lazy=False)
      >>> optimizer = nnx.Optimizer(bag, adam, wrt=nnx.Param)
      >>> loss = lambda bag: (bag(jnp.array([[1, 2]])) ** 2).sum()
      >>> jbag.nnx.catch_up(bag, optimizer, jbag.grad(loss)(bag))
      >>> _ = optimizer.update(bag, jbag.grad(loss)(bag))
      >>> jbag.nnx.catch_up(bag, optimizer)  # before an evaluation
    """
    params = nnx.as_pure(nnx.state(model, optimizer.wrt))
    if reads is not None:
        reads = nnx.as_pure(nnx.state(reads, optimizer.wrt))
    opt_state = nnx.as_pure(optimizer.opt_state)
    params, opt_state = catch_up_params(params, opt_state, reads)
    nnx.update(model, params)
    nnx.update(optimizer.opt_state, nnx.state(opt_state))

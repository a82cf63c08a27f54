"""Compiles jbag's programs for a TPU on a machine without one; prints figures as JSON.

    python sparsecore_programs.py v6e:2x2

It needs libtpu. Nothing runs.
"""

import json
import os
import re
import sys

if __name__ == "__main__":  # before JAX is imported
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # No TPU is opened that another process could have.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

import jbag

V, B, L = 1_000_000, 4096, 20


def squares(bag):
    """Return a loss of a table and the other operands of a bag."""
    return lambda table, *bags: (bag(table, *bags).astype(jnp.float32) ** 2).sum()


def programs():
    """Yield each program's name, its function, operands and donated arguments."""
    for dtype, D, layout, kinds in (
        ("float32", 128, "rectangular", ("sum", "max", "sharded")),
        ("float32", 128, "ragged", ("sum", "weighted", "max", "gradient", "step")),
        ("bfloat16", 256, "ragged", ("sum", "min")),
        ("bfloat16", 128, "rectangular", ("sum",)),
        ("float32", 256, "rectangular", ("sum",)),
        ("float32", 64, "rectangular", ("sum", "packed")),
        ("float32", 32, "ragged", ("packed",)),
        ("bfloat16", 64, "ragged", ("packed",)),
        ("float32", 100, "rectangular", ("packed",)),
    ):
        for kind in kinds:
            yield f"{layout}_{dtype}_{D}_{kind}", *program(dtype, D, layout, kind)


def program(dtype, D, layout, kind):  # noqa: N803  (the glossary's letter)
    shape = (B * L,) if layout == "ragged" else (B, L)
    table = jax.ShapeDtypeStruct((V, D), dtype)
    bags = [jax.ShapeDtypeStruct(shape, jnp.int32)]
    if layout == "ragged":
        bags.append(jax.ShapeDtypeStruct((B + 1,), jnp.int32))

    def pool(table, indices, offsets=None, weights=None, *, mode="sum", **options):
        return jbag.embedding_bag(
            table,
            indices,
            offsets,
            mode=mode,
            weights=weights,
            include_last_offset=offsets is not None,
            implementation="sparsecore",
            **options,
        )

    if kind == "packed":
        table = jax.eval_shape(lambda table: jbag.pack(table, always=True), table)
        return pool, (table, *bags), ()
    if kind == "weighted":
        weights = jax.ShapeDtypeStruct(shape, dtype)
        function = lambda *x: pool(*x, mode="mean", padding_idx=3)
        return function, (table, *bags, weights), ()
    if kind == "sharded":
        sharded = jax.shard_map(pool, in_specs=(P(), P("x")), out_specs=P("x"))
        return jax.grad(squares(sharded)), (table, *bags), ()
    if kind == "gradient":
        return jax.grad(squares(pool)), (table, *bags), ()
    if kind == "step":
        optimizer = jbag.optim.adagrad(0.05)
        loss = squares(lambda *x: pool(*x, sparse=True))

        def step(table, state, *bags):
            gradient = jbag.grad(loss)(table, *bags)
            update, state = optimizer.update(gradient, state, table)
            return optax.apply_updates(table, update), state

        state = jax.eval_shape(optimizer.init, table)
        return step, (table, state, *bags), (0, 1)
    return lambda *x: pool(*x, mode=kind), (table, *bags), ()


def main(topology, *names):
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    found = {}
    for name, function, operands, donated in programs():
        if names and name not in names:
            continue
        # The mesh tells Pallas the kind of the device.
        num_devices = 2 if name.endswith("sharded") else 1
        mesh = jax.sharding.Mesh(devices[:num_devices], ("x",))
        sharding = jax.sharding.NamedSharding(mesh, P())
        operands = jax.tree.map(
            lambda x, sharding=sharding: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=sharding
            ),
            operands,
        )
        with jax.set_mesh(mesh):
            lowered = jax.jit(function, donate_argnums=donated).lower(*operands)
            compiled = lowered.compile()
        kernels = re.findall(r"%(jbag_sparsecore_\w+?)[.\d]* = ", compiled.as_text())
        found[name] = {
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "kernels": kernels,
        }
        print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

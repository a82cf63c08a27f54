"""Compiles jbag's programs for a TPU on a machine without one; prints figures as JSON.

    python tpu_programs.py v5e:2x2
    python tpu_programs.py v5e:2x2 --all --only sum_gradient_64

By default it compiles half of the programs, each in one width and dtype, others for the
next generation. Gradients and steps have a small batch: the compiler takes its time for
their sort, and the longer the larger it is. It needs `libtpu`. Nothing runs.
"""

import argparse
import functools
import itertools
import json
import math
import os
import re
import sys
import time

if __name__ == "__main__":  # before JAX is imported
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # of a machine in Google's cloud
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no lock: no TPU is used
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ.pop("XLA_FLAGS", None)  # of the tests

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies

import jbag

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
TABLE_BYTES, B, L, STEPS = 1 << 30, 4096, 20, 100
WIDTHS = (10, 16, 32, 64, 100, 128, 300)
DTYPES = ("float32", "bfloat16")
RULES = ("sgd", "rowwise_adagrad", "adam")  # each in several programs
OPTIMIZERS = {
    **{rule: getattr(jbag.optim, rule)(0.05) for rule in RULES},
    "momentum": jbag.optim.sgd(0.05, momentum=0.9),
    "adagrad": jbag.optim.adagrad(0.05, weight_decay=0.1),
    "rowwise_adam": jbag.optim.rowwise_adam(0.05),
    "rowwise_rmsprop": jbag.optim.rowwise_adam(0.05, b1=0),
    "ftrl": jbag.optim.ftrl(0.05, l1=0.1),
}
OPERATIONS = "while|sort|scatter|gather|copy|copy-start|fusion|custom-call"


def without_tpu_compiler():
    """Skip the test; in CI, where the compiler must be, fail."""
    required = os.environ.get("JBAG_REQUIRE_TPU_COMPILER") == "1"
    (pytest.fail if required else pytest.skip)(
        "the compiler for TPUs is not installed: pip install -e '.[tpu-compiler]'"
    )


def make_table(width, dtype):
    """Return the operand of the programs that is a table, as modules have it."""
    rows = TABLE_BYTES // (width * jnp.dtype(dtype).itemsize)
    array = jax.ShapeDtypeStruct((rows, width), dtype)
    return jax.eval_shape(functools.partial(jbag.pack, always=True), array)


def count_bytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def pool(mode, **options):
    """Return a function of a table, weights or None, ids and offsets or nothing."""

    def bag(table, weights, indices, offsets=None):
        ragged = {} if offsets is None else {"include_last_offset": True}
        return jbag.embedding_bag(
            table, indices, offsets, mode=mode, weights=weights, **ragged, **options
        )

    return bag


def squares(bag):
    """Return a loss of a table and the other operands of a bag."""
    return lambda *operands: (bag(*operands).astype(jnp.float32) ** 2).sum()


def make_step(optimizer):
    """Return the step of an optimizer, of (table, state) and a batch."""
    loss = squares(pool("sum", sparse=True))

    def step(trained, batch):
        table, state = trained
        gradient = jbag.grad(loss)(table, None, *batch)
        update, state = optimizer.update(gradient, state, table)
        return (optax.apply_updates(table, update), state), None

    return step


def make_bags(layout, num_bags):
    """Return the operands that are ids, and offsets of ragged bags."""
    if layout == "rectangular":
        return [jax.ShapeDtypeStruct((num_bags, L), jnp.int32)]
    return [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (num_bags * L, num_bags + 1)]


def programs(width, dtype, bags_of_gradients):
    """Yield each program's name, its function, operands and donated arguments."""
    table = make_table(width, dtype)
    for layout in ("ragged", "rectangular"):
        bags = make_bags(layout, B)
        weights = jax.ShapeDtypeStruct(bags[0].shape, dtype)
        plain = table, None, *bags
        yield f"{layout}_sum", pool("sum"), plain, ()
        weighted = pool("mean", padding_idx=3)
        yield f"{layout}_weighted_mean", weighted, (table, weights, *bags), ()
        yield f"{layout}_max", pool("max"), plain, ()
        by_dma = pool("sum", implementation="tensorcore")
        yield f"{layout}_tensorcore_sum", by_dma, plain, ()
        bags = make_bags(layout, bags_of_gradients)
        plain = table, None, *bags
        yield f"{layout}_sum_gradient", jax.grad(squares(pool("sum"))), plain, ()
        yield f"{layout}_max_gradient", jax.grad(squares(pool("max"))), plain, ()
        for rule, optimizer in OPTIMIZERS.items():
            step = make_step(optimizer)
            trained = table, jax.eval_shape(optimizer.init, table)
            yield f"{layout}_step_{rule}", step, (trained, bags), (0,)
            if rule not in RULES:
                continue
            batches = [jax.ShapeDtypeStruct((STEPS, *x.shape), x.dtype) for x in bags]

            def scan(trained, batches, step=step):
                return jax.lax.scan(step, trained, batches)[0]

            yield f"{layout}_scan_{rule}", scan, (trained, batches), (0,)


def cases(topology, everything):
    """Yield widths, dtypes and programs: all, or a selection for the tests.

    It has each program for ragged bags or for rectangular ones, the other for the next
    generation, and each time in another of the widths and dtypes; one scan; and steps
    of optimizers that are not in `RULES` for one generation each.
    """
    if everything:
        for width, dtype in itertools.product(WIDTHS, DTYPES):
            for program in programs(width, dtype, B):
                yield width, dtype, program
        return
    generation = TOPOLOGIES.index(topology)
    kinds = list(itertools.product(WIDTHS, DTYPES))
    found = {kind: list(programs(*kind, 128)) for kind in kinds}
    left_out = [f"_scan_{rule}" for at, rule in enumerate(RULES) if at != generation]
    for at, rule in enumerate(OPTIMIZERS):
        if rule not in RULES and at % len(TOPOLOGIES) != generation:
            left_out.append(f"_step_{rule}")
    for at in range(generation % 2, len(found[kinds[0]]), 2):
        kind = kinds[(at // 2 + generation) % len(kinds)]
        program = found[kind][at]
        if not program[0].endswith(tuple(left_out)):
            yield *kind, program


def figures(name, function, operands, donated, device):
    sharding = jax.sharding.SingleDeviceSharding(device)
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), operands
    )

    def program(*operands):
        return function(*operands)

    program.__name__ = name
    start = time.process_time()
    compiled = jax.jit(program, donate_argnums=donated).lower(*operands).compile()
    seconds = time.process_time() - start
    memory = compiled.memory_analysis()
    found = re.findall(rf"(?<![\w-])({OPERATIONS})\(", compiled.as_text())
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "operand_bytes": count_bytes(operands),
        "table_bytes": count_bytes(jax.tree.leaves(operands)[0]),
        "donated_bytes": count_bytes([operands[at] for at in donated]),
        "operations": {each: found.count(each) for each in sorted(set(found))},
        "processor_seconds": round(seconds, 1),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("topology", choices=TOPOLOGIES)
    parser.add_argument(
        "--all", action="store_true", help="every program, gradients of 4096 bags"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    args = parser.parse_args(argv)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
    found = {}
    for width, dtype, (program, *parts) in cases(args.topology, args.all):
        name = f"{program}_{width}_{dtype}"
        if any(part in name for part in args.only):
            found[name] = figures(name, *parts, topology.devices[0])
            print(name, found[name], file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Compiles jbag's programs for a GPU on a machine without one; prints figures as JSON.

    python gpu_programs.py h100

It needs JAX's plugin for CUDA and `nvidia-cuda-nvcc`. Nothing runs: the sort is XLA's
fallback, as the choice of another needs the GPU.
"""

import json
import os
import pathlib
import re
import sys
import tempfile

if __name__ == "__main__":  # before JAX is imported
    dump = tempfile.TemporaryDirectory()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["XLA_FLAGS"] = (
        f"--xla_dump_to={dump.name} --xla_dump_emitter_re=ptx"
        " --xla_gpu_autotune_level=0"
    )

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies

import jbag

# What the compiler knows of a GPU, from NVIDIA's data sheets.
COMMON = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  core_count: {cores}
  fpus_per_core: {fpus}
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
GPUS = {
    "a100": {
        "shared": 164 << 10,
        "optin": 163 << 10,
        "cores": 108,
        "fpus": 64,
        "bandwidth": 2_039_000_000_000,
        "cache": 40 << 20,
        "clock": 1.41,
        "memory": 80 << 30,
        "major": 8,
        "name": "NVIDIA A100-SXM4-80GB",
    },
    "h100": {
        "shared": 228 << 10,
        "optin": 227 << 10,
        "cores": 132,
        "fpus": 128,
        "bandwidth": 3_350_000_000_000,
        "cache": 50 << 20,
        "clock": 1.98,
        "memory": 80 << 30,
        "major": 9,
        "name": "NVIDIA H100 80GB HBM3",
    },
}


def without_gpu_compiler():
    """Skip the test; in CI, where the compilers must be, fail."""
    required = os.environ.get("JBAG_REQUIRE_GPU_COMPILER") == "1"
    (pytest.fail if required else pytest.skip)(
        "compilers for GPUs are not installed: pip install -e '.[gpu-compiler]'"
    )


V, B, D = 1_000_000, 4096, 64


def squares(bag):
    """Return a loss of a table and the other operands of a bag."""
    return lambda table, *bags: (bag(table, *bags).astype(jnp.float32) ** 2).sum()


def programs(gpu):
    """Yield each program's name, its function, operands and donated arguments."""
    yield from programs_of("ragged", "float32", 20, ("sgd", "adam"))
    if gpu == "a100":  # the rest is alike
        return
    yield from programs_of("rectangular", "bfloat16", 20, ("rowwise_adagrad",))
    for dtype in ("float32", "bfloat16"):
        yield from list(programs_of("rectangular", dtype, 200, ()))[:3]


def programs_of(layout, dtype, length, rules):
    shape = (B * length,) if layout == "ragged" else (B, length)
    table = jax.ShapeDtypeStruct((V, D), dtype)
    weights = jax.ShapeDtypeStruct(shape, dtype)
    bags = [jax.ShapeDtypeStruct(shape, jnp.int32)]
    if layout == "ragged":
        bags.append(jax.ShapeDtypeStruct((B + 1,), jnp.int32))
    name = f"{layout}_{dtype}_{length}"

    def pool(mode, **options):
        def bag(table, weights, indices, offsets=None):
            ragged = {} if offsets is None else {"include_last_offset": True}
            return jbag.embedding_bag(
                table, indices, offsets, mode=mode, weights=weights, **ragged, **options
            )

        return bag

    def unweighted(mode, **options):
        bag = pool(mode, **options)
        return lambda table, *bags: bag(table, None, *bags)

    weighted = pool("mean", padding_idx=3)
    yield f"{name}_sum", unweighted("sum"), (table, *bags), ()
    yield f"{name}_weighted", weighted, (table, weights, *bags), ()
    yield f"{name}_max", unweighted("max"), (table, *bags), ()
    for kind in ("sum", "max"):
        gradient = jax.grad(squares(unweighted(kind)))
        yield f"{name}_{kind}_gradient", gradient, (table, *bags), ()
    gradient = jax.grad(squares(weighted), argnums=(0, 1))
    yield f"{name}_weighted_gradient", gradient, (table, weights, *bags), ()

    loss = squares(unweighted("sum", sparse=True))
    yield (
        f"{name}_coalesce",
        lambda table, *bags: jbag.grad(loss)(table, *bags).coalesce(),
        (table, *bags),
        (),
    )
    for rule in rules:
        optimizer = getattr(jbag.optim, rule)(0.05)

        def step(table, state, *bags, optimizer=optimizer):
            gradient = jbag.grad(loss)(table, *bags)
            update, state = optimizer.update(gradient, state, table)
            return optax.apply_updates(table, update), state

        state = jax.eval_shape(optimizer.init, table)
        yield f"{name}_step_{rule}", step, (table, state, *bags), (0, 1)


def main(gpu):
    spec = COMMON.format(**GPUS[gpu])
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=spec, topology="1x1x1"
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    found = {}
    for name, function, operands, donated in programs(gpu):
        operands = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            operands,
        )

        def program(*operands, function=function):
            return function(*operands)

        program.__name__ = name
        lowered = jax.jit(program, donate_argnums=donated).lower(*operands)
        compiled = lowered.compile()
        kernels = {
            re.search(r"\.entry (\S+?)\(", body)[1]: body
            for path in pathlib.Path(dump.name).glob(f"*jit_{name}.*.ptx")
            for body in re.split(r"(?=\.entry )", path.read_text())[1:]
        }
        found[name] = {
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "kernels": sum(not kernel.startswith("sort") for kernel in kernels),
            "compare_and_swap": [
                kernel
                for kernel, body in kernels.items()
                if re.search(r"atom\S*\.cas", body)
            ],
            "most_loads": max(
                body.count("ld.global")
                for kernel, body in kernels.items()
                if not kernel.startswith("sort")
            ),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])

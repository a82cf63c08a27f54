"""The bytes that plans reckon with, beside those of compiled programs."""

import importlib.util
import json
import os
import subprocess
import sys

import mesh_programs
import pytest
from hlo import bytes_sent
from mesh_programs import COUNT, STRATEGIES, batch_bytes, options_on_tpus, plan_bytes
from meshes import make_mesh
from slow import slow
from tpu_programs import without_tpu_compiler

from jbag.ops._packing import Packing

pytestmark = pytest.mark.standard_promotion


def check_sent(found, strategy, devices, *, beside_step=0, **options):
    """Compare what is sent with what is planned, and what a step may send besides."""
    forward, backward, _ = plan_bytes(strategy, devices, **options)
    # Besides, two slots a feature tell its bags apart, and losses are summed up.
    apart = 2 * COUNT * (options["width"] + 1) * 4 * devices + 200
    assert forward <= found["forward"] <= forward + apart
    least = forward + backward
    assert least <= found["step"] <= least + 2 * apart + beside_step


@pytest.mark.parametrize(
    ("strategy", "weighted"),
    [
        ("row_wise", False),
        *slow(("row_wise", True), ("column_wise", True), ("table_wise", True)),
        *slow(("data_parallel", False)),
    ],
)
def test_a_step_sends_what_is_planned(strategy, weighted):
    mesh = make_mesh(sizes=(4,))
    options = {"rows": 3000, "width": 32, "slots": 500, "weighted": weighted}
    forward, step = mesh_programs.lower(strategy, mesh, **options)
    found = mesh_programs.measure(forward, step, 4)
    check_sent(found, strategy, 4, **options)
    planned = plan_bytes(strategy, 4, **options)[2] + batch_bytes(500, weighted)
    assert found["arguments"] + found["temporaries"] < planned


@pytest.fixture(scope="module", params=["v5e:2x2", *slow("v5e:4x4", "v5p:2x2x4")])
def on_tpus(request):
    """Figures of every strategy's programs, compiled for a mesh of TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        without_tpu_compiler()
    command = [sys.executable, mesh_programs.__file__, request.param]
    # It would keep the program from the modules beside it.
    env = {k: x for k, x in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_on_tpus_sends_what_is_planned_and_copies_no_table(on_tpus, strategy):
    devices, found = on_tpus["devices"], on_tpus["figures"][strategy]
    options = options_on_tpus(strategy, devices)
    # The compiler gathers the ids of replicated rows as a sum: there and back.
    ids = 4 * (devices - 1) * COUNT * options["slots"]
    beside_step = ids if strategy == "data_parallel" else 0
    check_sent(found, strategy, devices, beside_step=beside_step, **options)
    # Temporaries with few columns are padded to 128, so that a plan says too little of
    # rows in use; nearly all that it says is held are tables.
    planned = plan_bytes(strategy, devices, **options)[2]
    packing = Packing(options["rows"], options["width"])
    lines = packing.width / (packing.rows_per_line * packing.features)
    assert found["arguments"] < lines * planned + batch_bytes(options["slots"])
    assert found["temporaries"] < planned / 8


def test_asynchronous_collectives_count_their_results_alone():
    class Compiled:
        def as_text(self):
            return """
  %a = (f32[8]{0}, f32[4,8]{1,0}) all-gather-start(%x), dimensions={0}
  %b = f32[4,8]{1,0} all-gather-done(%a)
  %c = ((f32[8]{0}, s32[]), (f32[4,8]{1,0}, s32[4])) all-gather-start(%x, %y)
  %d = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x)
  %e = (f32[8]{0}, f32[8]{0}) all-reduce-start(%x, %y)
"""

    gathered, both, permuted, summed = 128, 144, 32, 64
    sent = (gathered + both + permuted + 2 * summed) * 3 / 4
    assert bytes_sent(Compiled(), 4) == sent

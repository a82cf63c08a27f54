"""What XLA's compiler for TPUs makes of jbag's programs, on a machine without a TPU."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
import tpu_programs
from tpu_programs import TABLE_BYTES

PROGRAM = pathlib.Path(tpu_programs.__file__)


@pytest.fixture(scope="module", params=tpu_programs.TOPOLOGIES)
def compiled(request):
    """Figures of programs, for a generation of TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        tpu_programs.without_tpu_compiler()
    command = [sys.executable, PROGRAM, request.param]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_program_copies_the_table(compiled):
    for name, program in compiled.items():
        assert program["temporary_bytes"] < TABLE_BYTES / 4, name


def test_no_operand_is_padded(compiled):
    for name, program in compiled.items():
        assert program["argument_bytes"] < 1.05 * program["operand_bytes"], name


def test_tables_take_little_more_than_their_numbers(compiled):
    for name, program in compiled.items():
        assert program["table_bytes"] < 1.3 * TABLE_BYTES, name


def test_steps_write_into_the_table_and_its_states(compiled):
    trained = [name for name in compiled if "_step_" in name or "_scan_" in name]
    assert trained
    for name in trained:
        program = compiled[name]
        assert program["donated_bytes"] >= 0.99 * TABLE_BYTES, name
        assert program["alias_bytes"] >= program["donated_bytes"], name
        # A tuple's pointers are no part of the alias.
        assert program["output_bytes"] <= program["alias_bytes"] + 4096, name


def test_a_dense_gradient_is_written_once(compiled):
    gradients = [name for name in compiled if "_gradient_" in name]
    assert gradients
    for name in gradients:
        assert compiled[name]["output_bytes"] < 1.01 * compiled[name]["table_bytes"]

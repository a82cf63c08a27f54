"""Packages import one way: each knows those below it, and none above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jbag

ROOT = Path(jbag.__file__).parent
BELOW_OPS = {"_validation", "ragged"}
BELOW_COLLECTION = {*BELOW_OPS, "ops", "sparse", "_mesh"}
BELOW_FLAX = {*BELOW_COLLECTION, "collection", "interop"}
# What each part of the library may import of the others.
IMPORTS = {
    "_validation": set(),
    "_files": set(),
    "ragged": {"_validation"},
    "ops": BELOW_OPS,
    "sparse": {*BELOW_OPS, "ops"},
    "optim": {*BELOW_OPS, "ops", "sparse"},
    "_mesh": {*BELOW_OPS, "ops", "sparse"},
    "collection": BELOW_COLLECTION,
    "data": {"_files", "_validation", "interop", "ragged"},
    "sharding": {*BELOW_COLLECTION, "collection", "data"},
    "interop": {"_files", *BELOW_OPS, "ops", "sparse"},
    "text": {"_files", *BELOW_OPS, "interop"},
    "vocabulary": {*BELOW_OPS, "ops", "text"},
    "fasttext": {"_files", *BELOW_OPS, "ops", "text"},
    "linen": BELOW_FLAX,
    "nnx": {*BELOW_FLAX, "optim"},
}


def imported(path):
    """Yield the modules that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("part", IMPORTS)
def test_a_part_imports_those_below_it(part):
    paths = [*ROOT.glob(f"{part}.py"), *ROOT.glob(f"{part}/**/*.py")]
    assert paths
    for path in paths:
        names = [name.split(".") for name in imported(path)]
        own = {name[1] for name in names if name[0] == "jbag" and len(name) > 1}
        assert own <= IMPORTS[part] | {part}, path


def test_every_part_is_listed():
    entries = {path.stem for path in ROOT.iterdir() if not path.name.startswith("__")}
    assert entries - {"csrc", "py", "CHANGELOG"} == set(IMPORTS)
    assert len([path for path in ROOT.iterdir() if path.suffix != ".so"]) <= 20


@pytest.mark.parametrize("package", ["flax", "optax"])
def test_the_function_needs_neither_flax_nor_optax(package):
    check = f"import sys; sys.modules[{package!r}] = None; import jbag, jbag.sparse"
    subprocess.run([sys.executable, "-c", check], check=True)

"""Every example in a docstring, and every block of code in the README, runs."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import flax
import jax
import jax.numpy as jnp
import numpy
import optax
import pytest
from fasttext_files import EXAMPLE, model

import jbag
from jbag.ops.kernels import KERNELS

README = pathlib.Path(__file__).parent.parent / "README.md"
FLAGS = (
    doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
)

MODULES = ["jbag"] + [
    module.name
    for module in pkgutil.walk_packages(jbag.__path__, "jbag.")
    if ".lib" not in module.name  # C++, which is no module of Python's
]


@pytest.fixture(autouse=True)
def strict_promotion():
    """Examples run under JAX's defaults."""


@pytest.fixture(autouse=True)
def files(tmp_path):
    """What examples read."""
    (tmp_path / "model.bin").write_bytes(model(**EXAMPLE))
    (tmp_path / "vectors.vec").write_text("2 3\nto 1 2 3\nbe 4 5 6\n")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, tmp_path):
    module = importlib.import_module(name)
    names = {"jbag": jbag, "jax": jax, "jnp": jnp, "numpy": numpy, "flax": flax}
    names |= {"optax": optax, "directory": tmp_path, "np": numpy}
    names |= {"P": jax.sharding.PartitionSpec}
    results = doctest.testmod(module, extraglobs=names, optionflags=FLAGS)
    assert results.failed == 0
    source = pathlib.Path(str(module.__file__)).read_text()
    assert results.attempted > 0 or ">>>" not in source


PUBLIC = [
    name
    for name in dir(jbag)
    if not name.startswith("_") and callable(getattr(jbag, name))
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_an_example(name):
    assert ">>>" in getattr(jbag, name).__doc__


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for number, block in enumerate(blocks):
        if 'implementation="cpu"' in block and KERNELS["cpu"].missing:
            continue  # where it is required, every test of the kernel fails
        parser = doctest.DocTestParser()
        if ">>>" in block:
            test = parser.get_doctest(block, names, f"README block {number}", None, 0)
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            runner.run(test, clear_globs=False)
            names.update(test.globs)
            assert runner.summarize().failed == 0
        else:
            exec(compile(block, f"README block {number}", "exec"), names)


def test_readme_names_every_public_name():
    text = README.read_text()
    for name in PUBLIC:
        assert name in text


def test_the_core_imports_neither_flax_nor_optax():
    import subprocess
    import sys

    check = (
        "import sys, jbag; jbag.embedding_bag; "
        "assert not {'flax', 'optax', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", check], check=True)

"""Every example in a docstring, in README and in the guides runs."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import tomllib

import flax
import jax
import jax.numpy as jnp
import numpy
import optax
import pytest
from fasttext_files import EXAMPLE, model

import jbag
from jbag.ops.kernels import KERNELS

pytestmark = pytest.mark.standard_promotion
ROOT = pathlib.Path(__file__).parent.parent
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
PAGES = {path.name: path for path in [ROOT / "README.md", *GUIDES]}
FLAGS = (
    doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
)

MODULES = ["jbag"] + [
    module.name
    for module in pkgutil.walk_packages(jbag.__path__, "jbag.")
    if ".lib" not in module.name  # C++, which is no module of Python's
]


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


PUBLIC = [name for name in jbag.__all__ if callable(getattr(jbag, name))]
PACKAGES = {
    name: getattr(jbag, name)
    for name in jbag.__all__
    if inspect.ismodule(getattr(jbag, name))
}
EXPLAINED = {f"jbag.{name}": getattr(jbag, name) for name in PUBLIC} | {
    f"jbag.{package}.{name}": getattr(module, name)
    for package, module in PACKAGES.items()
    for name in module.__all__
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_public_names_have_an_example(name):
    assert ">>>" in EXPLAINED[name].__doc__


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGES[page].read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks or page == "migrating.md"  # tables of names alone
    names: dict = {}
    for number, block in enumerate(blocks):
        if 'implementation="cpu"' in block and KERNELS["cpu"].missing:
            continue  # where it is required, every test of the kernel fails
        parser = doctest.DocTestParser()
        if ">>>" in block:
            test = parser.get_doctest(block, names, f"{page} block {number}", None, 0)
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            runner.run(test, clear_globs=False)
            names.update(test.globs)
            assert runner.summarize().failed == 0
        else:
            exec(compile(block, f"{page} block {number}", "exec"), names)


def test_pages_name_every_public_name():
    text = "".join(path.read_text() for path in PAGES.values())
    assert not [name for name in PUBLIC if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize(
    "path",
    [
        *PAGES.values(),
        ROOT / "examples" / "README.md",
        ROOT / "examples" / "benchmarks" / "README.md",
        ROOT / "jbag" / "csrc" / "README.md",
        ROOT / "jbag" / "sharding" / "README.md",
        ROOT / "tests" / "README.md",
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_of_a_page_lead_to_files_and_headings(path):
    for file, heading in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", path.read_text()):
        target = path.parent / file if file else path
        assert target.exists(), file
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_version_is_the_one_of_pyproject_and_of_the_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert jbag.__version__ == project["version"]
    changelog = (ROOT / "jbag" / "CHANGELOG.md").read_text()
    assert changelog.split("## ")[1].split()[0] == project["version"]


def test_the_core_imports_neither_flax_nor_optax():
    import subprocess
    import sys

    check = (
        "import sys, jbag; jbag.embedding_bag; "
        "assert not {'flax', 'optax', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", check], check=True)

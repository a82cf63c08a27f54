"""Tables from the files of other libraries."""

import pickle
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbag

DTYPES = ("float32", "float64", "float16", "bfloat16")
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(7, 3)).astype(np.float32)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.numpy")


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_give_the_table_bit_for_bit(dtype, safetensors, tmp_path):
    table = TABLE.astype(dtype)
    tensors = {"bag.weight": table, "bias": np.ones(3, np.float32)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    for name in (None, "bag.weight"):
        found = jbag.load_table(tmp_path / "model.safetensors", name)
        assert found.dtype == dtype
        assert found.tobytes() == table.tobytes()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_files_give_the_table_bit_for_bit(dtype, zipped, torch, tmp_path):
    peer = torch.tensor(TABLE).to(getattr(torch, dtype))
    state = {"state": {"bag": {"weight": peer}}, "epoch": 3, "bias": torch.ones(3)}
    path = tmp_path / "model.pt"
    for given, names in ((state, (None, "state.bag.weight")), (peer, (None, ""))):
        torch.save(given, path, _use_new_zipfile_serialization=zipped)
        for name in names:
            found = jbag.load_table(path, name)
            assert found.dtype == dtype
            assert found.tobytes() == TABLE.astype(dtype).tobytes()


def test_the_state_of_a_torch_module_pools_as_it_does(torch, tmp_path):
    module = torch.nn.EmbeddingBag(10, 3)
    torch.save(module.state_dict(), tmp_path / "bag.pth")
    table = jbag.load_table(tmp_path / "bag.pth", "weight")
    expected = module(torch.tensor([[1, 2], [3, 3]])).detach().numpy()
    oracle.assert_close(jbag.embedding_bag(table, [[1, 2], [3, 3]]), expected)


def test_a_whole_torch_module_is_an_error_and_runs_nothing(torch, tmp_path):
    torch.save(torch.nn.EmbeddingBag(10, 3), tmp_path / "bag.pt")
    with pytest.raises(ValueError, match="must hold tensors, in dictionaries or alone"):
        jbag.load_table(tmp_path / "bag.pt")


def test_numpy_files_give_the_table(tmp_path):
    np.save(tmp_path / "table.npy", TABLE)
    np.savez(tmp_path / "table.npz", table=TABLE, ids=np.arange(6).reshape(2, 3))
    for path, name in (
        ("table.npy", None),
        ("table.npz", None),
        ("table.npz", "table"),
    ):
        np.testing.assert_array_equal(jbag.load_table(tmp_path / path, name), TABLE)


def test_several_tables_without_a_name_are_an_error_with_their_names(tmp_path):
    np.savez(tmp_path / "tables.npz", users=TABLE, items=TABLE[:2], bias=TABLE[0])
    names = (
        r"holds 'users' float32\[7, 3\], 'items' float32\[2, 3\], 'bias' float32\[3\]\."
    )
    with pytest.raises(ValueError, match=names):
        jbag.load_table(tmp_path / "tables.npz")
    with pytest.raises(ValueError, match=r"got 'user'\. It holds 'users'"):
        jbag.load_table(tmp_path / "tables.npz", "user")
    many = {f"t{i}": TABLE for i in range(30)}
    np.savez(tmp_path / "many.npz", **many)
    with pytest.raises(ValueError, match=r"'t19' float32\[7, 3\] and 10 more\."):
        jbag.load_table(tmp_path / "many.npz")
    np.savez(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="holds no tensors"):
        jbag.load_table(tmp_path / "none.npz")


def test_what_is_no_table_is_an_error(tmp_path):
    np.savez(tmp_path / "model.npz", bias=TABLE[0], ids=np.ones((2, 3), int))
    with pytest.raises(ValueError, match=r"got 'bias' of shape \(3,\)"):
        jbag.load_table(tmp_path / "model.npz", "bias")
    with pytest.raises(TypeError, match="got 'ids' of int64"):
        jbag.load_table(tmp_path / "model.npz", "ids")


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "npy", "pt"])
def test_broken_files_are_errors(suffix, tmp_path):
    if suffix in ("safetensors", "pt"):
        pytest.importorskip("torch" if suffix == "pt" else suffix)
    path = tmp_path / f"broken.{suffix}"
    for content in (b"", b"nonsense" * 9, pickle.dumps([TABLE], protocol=2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.\w+ (holds no|must hold)"):
            jbag.load_table(path)
    with pytest.raises(FileNotFoundError):
        jbag.load_table(tmp_path / f"missing.{suffix}")


def test_other_files_are_an_error_that_says_which_are_known(tmp_path):
    with pytest.raises(ValueError, match=r"one of \.safetensors, \.pt, .* got .*\.vec"):
        jbag.load_table(tmp_path / "vectors.vec")


@pytest.mark.parametrize(
    ("package", "suffix"), [("torch", "pt"), ("safetensors", "safetensors")]
)
def test_a_missing_package_is_an_error_that_names_it(package, suffix):
    check = (
        f"import sys; sys.modules[{package!r}] = None; import jbag\n"
        f"try: jbag.load_table('table.{suffix}')\n"
        f"except ImportError as error: assert 'pip install {package}' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_loaded_table_goes_into_a_module(tmp_path):
    np.save(tmp_path / "table.npy", TABLE.astype(jnp.float16))
    bag = jbag.EmbeddingBag.from_pretrained(jbag.load_table(tmp_path / "table.npy"))
    assert bag.num_embeddings, bag.features == TABLE.shape

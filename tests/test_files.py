"""Files are written whole or not at all, and read as they are or refused."""

import contextlib
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import fuzz_files
import jax.numpy as jnp
import numpy as np
import pytest
from fasttext_files import LABELS, OUTPUT, WORDS, Quantised, model

import jbag
from jbag.interop import _load_table

TABLE = np.arange(12.0, dtype=np.float32).reshape(4, 3)
ENCODERS = [
    jbag.text.Encoder(words=[f"{name}{i}" for i in range(2000)]) for name in ("a", "b")
]


def save(path, encoder=ENCODERS[0]):
    encoder.save(path)


def first_word(path):
    return jbag.text.Encoder.load(path).words[0]


def others(path):
    return [x for x in path.parent.iterdir() if x != path]


# Writers.


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with contextlib.suppress(KeyError), jbag.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert others(path) == []


def test_a_new_file_takes_the_mode_of_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.touch(0o600)
    with jbag.atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_first_file_has_the_mode_that_open_gives(tmp_path):
    (tmp_path / "plain").touch()
    with jbag.atomic_write(tmp_path / "file"):
        pass
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    path, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to(path)
    for text in ("first", "second"):
        with jbag.atomic_write(link) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    assert link.is_symlink()


def test_a_device_is_written_to_as_it_is():
    with jbag.atomic_write(os.devnull) as temporary:
        temporary.write_text("text")
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("name", [".", "missing/file", "file/below"])
def test_a_path_that_cannot_be_written_is_an_error(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="directory"):
        save(tmp_path / name)
    assert others(tmp_path / "file") == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_a_directory_that_is_not_writable_is_an_error():
    with pytest.raises(OSError, match="/proc"):
        save(Path("/proc/encoder.npz"))


def test_a_relative_path_is_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("encoder.npz")
    assert first_word(tmp_path / "encoder.npz") == "a0"


def run_python(code, *args):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import jbag
    encoder = jbag.text.Encoder(words=["new"] * 20000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    try:
        encoder.save(sys.argv[1])
    except OSError as error:
        print(type(error).__name__)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "encoder.npz"
    save(path)
    result = run_python(FULL_DISK, path)
    assert result.stdout == "OSError\n", result
    assert first_word(path) == "a0"
    assert others(path) == []


# Ends the process at the n-th call of a function that changes or flushes something.
KILLED = """
    import os, sys
    import pathlib
    import jbag

    n, calls = int(sys.argv[2]), 0
    encoder = jbag.text.Encoder(words=["new"] * 2000)

    def ending(function):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls == n:
                os._exit(9)
            return function(*args, **kwargs)
        return call

    for name in ("open", "fsync", "close", "replace", "unlink", "chmod"):
        setattr(os, name, ending(getattr(os, name)))
    for name in ("open", "replace", "unlink", "chmod"):
        setattr(pathlib.Path, name, ending(getattr(pathlib.Path, name)))
    encoder.save(sys.argv[1])
    print(calls)
"""


@pytest.mark.slow
def test_a_process_that_ends_between_any_two_writes_leaves_a_whole_file(tmp_path):
    path = tmp_path / "encoder.npz"
    found = []
    for n in range(1, 50):
        save(path)
        result = run_python(KILLED, path, n)
        found.append(first_word(path))
        if result.stdout:  # It came to its end, after less than n calls.
            break
        assert result.returncode == 9, result
    assert found[-1] == "new"
    assert found == sorted(
        found
    )  # the old one ("a0") up to some call, then the new one
    assert found.count("a0") >= 4


WRITER = """
    import sys
    import jbag
    encoder = jbag.text.Encoder(words=[f"{sys.argv[2]}{i}" for i in range(2000)])
    print("ready", flush=True)
    while True:
        encoder.save(sys.argv[1])
"""


def start_writer(path, name):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path), name],
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "encoder.npz"
    save(path)
    random = np.random.default_rng(0)
    for _ in range(5):
        with start_writer(path, "b") as process:
            time.sleep(random.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        assert first_word(path) in ("a0", "b0")


@pytest.mark.slow
def test_two_writers_at_once_leave_the_file_of_one(tmp_path):
    path = tmp_path / "encoder.npz"
    save(path)
    writers = [start_writer(path, name) for name in "ab"]
    found = {first_word(path) for _ in range(200)}
    for process in writers:
        process.kill()
        process.wait()
        process.stdout.close()
    assert found == {"a0", "b0"}


def test_threads_that_write_at_once_leave_the_file_of_one(tmp_path):
    path = tmp_path / "encoder.npz"
    threads = [
        threading.Thread(target=lambda e=e: [save(path, e) for _ in range(20)])
        for e in ENCODERS * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first_word(path) in ("a0", "b0")
    assert others(path) == []


# Readers.


def test_a_table_does_not_depend_on_its_file_any_more(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.numpy")
    paths = {kind: tmp_path / f"file.{kind}" for kind in ("pt", "npz", "safetensors")}
    torch.save({"t": torch.from_numpy(TABLE)}, paths["pt"])
    np.savez(paths["npz"], t=TABLE)
    safetensors.save_file({"t": TABLE}, paths["safetensors"])
    for path in paths.values():
        table = jbag.load_table(path)
        with path.open("r+b") as file:  # in place, as a mapped file would show
            file.write(b"\xff" * path.stat().st_size)
        np.testing.assert_array_equal(table, TABLE)
        with path.open("r+b") as file:
            file.truncate(0)
        np.testing.assert_array_equal(table, TABLE)


def test_only_the_array_that_is_asked_for_is_read(tmp_path):
    path = tmp_path / "file.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in {"t": TABLE, "zeros": np.zeros(1 << 24)}.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", file.getvalue())
    tracemalloc.start()
    np.testing.assert_array_equal(jbag.load_table(path, "t"), TABLE)
    np.testing.assert_array_equal(jbag.load_table(path), TABLE)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_small_files_that_declare_much_are_refused_before_it_is_allocated(tmp_path):
    shape = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 9), }"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + shape.ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(header + bytes(100))
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        file = io.BytesIO()
        np.save(file, np.zeros((1 << 21, 8)))
        archive.writestr("a.npy", file.getvalue())
    (tmp_path / "a.npz").write_bytes(deflated.getvalue())
    codes = Quantised(np.zeros((7, 1)), [np.zeros((256, 2), np.float32)])
    options = {"words": WORDS, "labels": LABELS, "output": OUTPUT, "ngrams": 2}
    pruned = model(**options, table=codes, buckets=(1 << 31) - 1, pruned=[(0, 0)])
    (tmp_path / "a.ftz").write_bytes(pruned)
    wide = Quantised(np.zeros((20000, 1)), [np.zeros((256, 9000), np.float32)])
    wide = model(
        words=WORDS, labels=[], kind="cbow", table=wide, output=TABLE, buckets=19000
    )
    (tmp_path / "b.ftz").write_bytes(wide)
    (tmp_path / "a.vec").write_bytes(b"1000000000 300\na 1 2\n")
    (tmp_path / "b.vec").write_bytes(b"a" + b" 1" * 100_000 + b"\nb 1" * 100_000)
    for name, match in {
        "a.npy": "takes 36000000000 bytes; 100 follow",
        "a.npz": "'a', expanded, would take 134217856 bytes",
        "a.ftz": "2147483647 buckets would take",
        "b.ftz": "its input matrix, expanded, would take 720000000 bytes",
        "a.vec": "must hold 1000000000 words of 300 numbers",
        "b.vec": "must hold 100001 words of 100000 numbers",
    }.items():
        path = tmp_path / name
        readers = {".ftz": jbag.fasttext.load, ".vec": jbag.fasttext.load_vectors}
        tracemalloc.start()
        with pytest.raises(ValueError, match=match) as error:
            readers.get(path.suffix, jbag.load_table)(path)
        assert str(path) in str(error.value)
        assert tracemalloc.get_traced_memory()[1] < 8 * path.stat().st_size + (1 << 25)
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, np.save])
def test_arrays_of_numpy_are_read_bit_for_bit(save, order, dtype, tmp_path):
    table = np.array(TABLE.astype(jnp.dtype(dtype)), order=order)
    path = tmp_path / ("file.npy" if save is np.save else "file.npz")
    save(path, table)
    found = jbag.load_table(path)
    assert found.dtype == table.dtype
    assert found.flags.c_contiguous
    assert found.tobytes() == table.tobytes()


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2"])
def test_the_other_byte_order_is_turned_round(dtype, tmp_path):
    np.save(tmp_path / "file.npy", TABLE.astype(dtype))
    found = jbag.load_table(tmp_path / "file.npy")
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, TABLE)
    bag = jbag.embedding_bag(found, [[0, 1]], mode="sum")
    np.testing.assert_array_equal(bag, TABLE[:2].sum(0, keepdims=True))


def test_names_that_two_tensors_have_are_an_error(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "file.pt"
    one, two = torch.ones(2, 2), torch.zeros(3, 2)
    for state, name in (
        ({"a.b": one, "a": {"b": two}, "c": one}, "a.b"),
        ({1: one, "1": two, "c": one}, "1"),
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=f"holds two of the name '{name}'"):
            jbag.load_table(path, name)
        with pytest.raises(ValueError, match=f"'{name}' twice"):
            jbag.load_table(path)
        np.testing.assert_array_equal(jbag.load_table(path, "c"), one)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", b"")
    (tmp_path / "file.npz").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="two arrays of the name 'a'"):
        jbag.load_table(tmp_path / "file.npz", "a")


def test_dictionaries_without_end_are_an_error(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    # To walk as far as a file may go takes seconds.
    monkeypatch.setattr(_load_table, "_MOST_TENSORS", 10_000)
    cyclic = {}
    cyclic["again"] = cyclic
    wide = torch.zeros(2, 2)
    for _ in range(30):
        wide = {"a": wide, "b": wide}
    deep = torch.zeros(2, 2)
    for _ in range(200):
        deep = {"a": deep}
    for state in (cyclic, wide, deep):
        torch.save(state, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=r"file\.pt .* too many dictionaries"):
            jbag.load_table(tmp_path / "file.pt")


def test_a_tensor_whose_rows_are_one_is_an_error(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(1).expand(100_000, 100_000), tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file\.pt .* its rows share memory"):
        jbag.load_table(tmp_path / "file.pt")


def test_a_part_of_a_larger_tensor_is_read_alone(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.arange(24.0).reshape(4, 6)[::2, 1:3], tmp_path / "file.pt")
    found = jbag.load_table(tmp_path / "file.pt")
    np.testing.assert_array_equal(found, [[1, 2], [13, 14]])
    assert found.flags.c_contiguous


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("suffix", ["npy", "npz", "pt", "pth", "bin"])
def test_nothing_in_a_file_is_run(suffix, tmp_path, monkeypatch):
    if suffix in ("pt", "pth", "bin"):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    path = Path(f"file.{suffix}")
    if suffix in ("npy", "npz"):
        save = np.save if suffix == "npy" else np.savez
        save(path, np.array([[Payload()]], object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps({"t": Payload()}, protocol=2))
    with pytest.raises(ValueError, match=f"file.{suffix}"):
        jbag.load_table(path)
    assert not Path("ran").exists()


def test_a_byte_order_mark_is_no_part_of_the_vectors(tmp_path):
    path = tmp_path / "file.vec"
    lines = "to 1 2 3\nbe 4 5 6\n"
    for head in ("", "2 3\n"):
        path.write_text("\ufeff" + head + lines, encoding="utf-8")
        words, table = jbag.fasttext.load_vectors(path)
        assert words == ("to", "be")
        np.testing.assert_array_equal(table, [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("words", lambda x: x[:-1]),
        ("words", lambda x: x.astype(np.int64)),
        ("counts", lambda x: x.astype(np.float32)),
        ("counts", lambda x: x[1:]),
        ("weights", lambda x: x.astype(np.int32)),
        ("options", lambda _: np.frombuffer(b'{"ngrams": 1}', np.uint8)),
        ("options", lambda _: np.frombuffer(b"[]", np.uint8)),
        ("options", lambda _: np.frombuffer(b"(" * 9, np.uint8)),
    ],
)
def test_an_encoder_of_other_parts_is_an_error(name, change, tmp_path):
    arrays = jbag.text.Encoder.fit(["a b", "b c"], tfidf=True).to_arrays()
    path = tmp_path / "encoder.npz"
    np.savez(path, **arrays)
    assert jbag.text.Encoder.load(path).words == ("b", "a", "c")
    np.savez(path, **{**arrays, name: change(arrays[name])})
    with pytest.raises(ValueError, match=r"encoder\.npz holds no encoder: ."):
        jbag.text.Encoder.load(path)


def test_arrays_of_an_encoder_make_the_same_one():
    for encoder in (
        jbag.text.Encoder.fit(["a b", "ü c"], tfidf=True, ngrams=2, buckets=9),
        jbag.text.Encoder(
            words=["\udcff", "x"],
            split="fasttext",
            lowercase=False,
            subwords=(2, 3),
            end="</s>",
            skip="#",
            buckets=3,
            bucket_rows=np.array([1, -1, 0], np.int32),
        ),
    ):
        same = jbag.text.Encoder.from_arrays(encoder.to_arrays())
        assert same.words == encoder.words
        texts = ["a b c ü", "#x x"]
        assert same.encode(texts).to_lists() == encoder.encode(texts).to_lists()
    with pytest.raises(ValueError, match="an encoder must have"):
        jbag.text.Encoder.from_arrays({"words": np.zeros(0, np.uint8)})


@pytest.mark.parametrize("kind", fuzz_files.SEEDS)
def test_files_are_read_before_they_are_changed(kind, tmp_path):
    for name, data in fuzz_files.SEEDS[kind]():
        (tmp_path / name).write_bytes(data)
        result = fuzz_files.run(tmp_path / name)
        assert result in ("read", "ValueError", "_NotFloatingError")  # by its name

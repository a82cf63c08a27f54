"""A fuzzer of everything that reads a file.

    python tests/support/fuzz_files.py --seconds 30

Whatever the bytes are, a reader gives what they say or raises ValueError or OSError,
with the file's name in it, in 10 s and 1.5 GB; what it gives is whole and sound. Files
are those of a writer, of which bytes, numbers, lengths, members of archives or lines
were changed, some of them so that sums and lengths still fit.
"""

import argparse
import faulthandler
import io
import itertools
import json
import random
import resource
import signal
import struct
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from fasttext_files import EXAMPLE, LABELS, OUTPUT, TABLE, WORDS, Quantised, model

import jbag

SECONDS, MEGABYTES = 10, 1500
NUMBERS = [0, 1, 2, 3, 127, 128, 255, 256, 1 << 15, 1 << 16, 1 << 24, 1 << 28]
NUMBERS += [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, -1]
NUMBERS += [-2, -(1 << 31), -(1 << 63)]
TEXTS = ["fine so poor", "a b c a b", "", "</s> naïve"]


# What is changed: a file's name and bytes, by the format.


def numpy_files():
    wide = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    kinds = [
        wide,
        wide.astype(np.float16),
        wide.astype(jnp.bfloat16),
        wide.astype(">f8"),
        np.asfortranarray(wide),
        np.arange(3),
        np.zeros((0, 3)),
    ]
    for array in kinds:
        file = io.BytesIO()
        np.save(file, array)
        yield "table.npy", file.getvalue()
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, table=wide, bias=np.zeros(3), names=np.array(["a", "b"]))
        yield "tables.npz", file.getvalue()
        file = io.BytesIO()
        save(file, table=np.zeros((2000, 30)))
        yield "table.npz", file.getvalue()


def encoders():
    texts = ["a rose is a rose", "to be or not to be"]
    options = {"ngrams": 2, "buckets": 50, "subwords": (2, 4)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "encoder.npz"
        for encoder in (
            jbag.text.Encoder.fit(texts),
            jbag.text.Encoder.fit(texts, tfidf=True, **options),
            jbag.text.Encoder(
                words=["a"], bucket_rows=np.array([0, -1, 1], np.int32), buckets=3
            ),
        ):
            encoder.save(path)
            yield "encoder.npz", path.read_bytes()


def vocabularies():
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vocabulary.npz"
        for ids in ([70, -1, 12], [2**64 - 1, 0], ["bern", "é", ""], [b"a", b"\xff"]):
            for counts in (None, range(len(ids))):
                jbag.data.IdVocabulary(ids, counts).save(path)
                yield "vocabulary.npz", path.read_bytes()


def torch_files():
    try:
        import torch
    except ImportError:
        return
    bag = torch.nn.EmbeddingBag(5, 3)
    states = [
        bag.state_dict(),
        {"model": {"bag.weight": torch.zeros(4, 2, dtype=torch.bfloat16)}, "epoch": 3},
        torch.ones(3, 2),
        {"a": torch.zeros(2, 2), "b": torch.zeros(6, 4)[::2, 1:3]},
    ]
    for state, zipped in itertools.product(states, (True, False)):
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        yield "state.pt", file.getvalue()


def safetensors_files():
    try:
        import safetensors.numpy
    except ImportError:
        return
    arrays = {"bag.weight": np.ones((4, 3), np.float32), "bias": np.zeros(3)}
    yield "model.safetensors", safetensors.numpy.save(arrays, {"format": "np"})
    yield "model.safetensors", safetensors.numpy.save({"a": np.ones((2, 2))})


def fasttext_files():
    random_numbers = np.random.default_rng(0)
    codes = random_numbers.integers(0, 256, (5 + 2, 1))
    centroids = [random_numbers.random((256, 2), np.float32)]
    small = Quantised(codes, centroids)
    norms = (random_numbers.integers(0, 256, 7), np.ones(256, np.float32))
    table = np.concatenate([TABLE, TABLE])
    yield "model.bin", model(**EXAMPLE)
    for loss in ("hs", "ova"):
        yield "model.bin", model(**{**EXAMPLE, "loss": loss, "version": 11})
    yield (
        "model.bin",
        model(**{**EXAMPLE, "table": table, "buckets": 5, "ngrams": 2}),
    )
    own = {"words": WORDS, "labels": LABELS, "ngrams": 2, "subwords": (2, 3)}
    for matrix in (small, small._replace(norms=norms)):
        pruned = model(
            **own,
            table=matrix,
            output=OUTPUT,
            buckets=9,
            pruned=[(0, 0), (3, 1)],
        )
        yield "model.ftz", pruned
    yield (
        "vectors.bin",
        model(
            words=WORDS, labels=[], table=table, output=TABLE, kind="cbow", buckets=5
        ),
    )


def vector_files():
    lines = "to 1 2 3\nbe -1.5e-3 .5 nan\nor 1e30 -inf 7\n"
    for head in ("3 3\n", "", "\ufeff3 3\n", "\ufeff"):
        yield "vectors.vec", (head + lines).encode()
    yield "vectors.vec", b"5 2\n" + b"w 1 2\n" * 5
    yield "vectors.vec", b"a b c 1 2\nnew york 3 4\n"


SEEDS = {
    "numpy": numpy_files,
    "encoder": encoders,
    "vocabulary": vocabularies,
    "torch": torch_files,
    "safetensors": safetensors_files,
    "fasttext": fasttext_files,
    "vectors": vector_files,
}


# How it is changed. Each takes a random generator and bytes, and returns bytes.


def flip(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def put_number(rng, data):
    data = bytearray(data)
    form = rng.choice(["<i", "<q", "<h", "<b", ">i", "<d"])
    at = rng.randrange(max(1, len(data) - struct.calcsize(form)))
    number = rng.choice(NUMBERS)
    if form == "<d":
        data[at : at + 8] = struct.pack(form, float(number))
    else:
        bits = 8 * struct.calcsize(form)
        number = (number + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
        data[at : at + bits // 8] = struct.pack(form, number)
    return bytes(data)


def truncate(rng, data):
    return data[: rng.randrange(len(data))]


def extend(rng, data):
    return data + rng.randbytes(rng.choice([1, 7, 4096]))


def remove(rng, data):
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice([1, 4, 8, 100]) :]


def repeat(rng, data):
    start = rng.randrange(len(data))
    part = data[start : start + rng.choice([1, 8, 50, 500])]
    return data[:start] + part * rng.choice([2, 3, 1000]) + data[start:]


def put_text(rng, data):
    tokens = [b"(", b")", b"{", b"[", b"'", b'"', b"\n", b"\0", b" ", b"9" * 30, b"-1"]
    tokens += [b"nan", b"1e999", b"\xff\xfe", b"None", b"True", b",", b"(" * 500]
    start = rng.randrange(len(data))
    return data[:start] + rng.choice(tokens) + data[start + rng.choice([0, 1, 4]) :]


def change_digits(rng, data):
    """Replace a number written as text, as sizes in headers are."""
    places = [at for at, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
    if not places:
        return flip(rng, data)
    at = rng.choice(places)
    return data[:at] + str(rng.choice(NUMBERS)).encode() + data[at + 1 :]


def change_member(rng, data):
    """Change a member of an archive, and write the archive anew."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(i.filename, archive.read(i)) for i in archive.infolist()]
    except Exception:  # of any kind: it isn't one, or isn't any more
        return change_header(rng, data)
    if not members:
        return change_header(rng, data)
    at = rng.randrange(len(members))
    name, content = members[at]
    kind = rng.randrange(6)
    if kind == 0:
        members.append((name, content))
    elif kind == 1:
        del members[at]
    elif kind == 2 and len(members) > 1:
        members[at] = (rng.choice(members)[0], content)
    else:
        members[at] = (name, rng.choice(SIMPLE)(rng, content or b"\0"))
    file = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def change_header(rng, data):
    """Change the JSON at the head of safetensors, and keep its length right."""
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        name = rng.choice(sorted(header))
    except Exception:  # of any kind: it has none, or none any more
        return rng.choice(SIMPLE)(rng, data)
    entry = header[name]
    if isinstance(entry, dict) and entry:
        key = rng.choice(sorted(entry))
        values = ["F32", "BF16", "F8_E4M3", "nonsense", [], [2, 2], [1 << 40, 0]]
        values += [[0, rng.choice(NUMBERS)], None, {}, rng.choice(NUMBERS)]
        entry[key] = rng.choice(values)
    if rng.random() < 0.2:
        header[rng.choice(["", "x.y", "__metadata__"])] = entry
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


SIMPLE = [flip, put_number, truncate, extend, remove, repeat, put_text, change_digits]
CHANGES = [*SIMPLE, change_member, change_member, change_member]


# What is read, and what must be true of it.


NAMES = {
    "tables.npz": [None, "table", "table", "bias", "names"],
    "table.npz": [None, "table"],
    "state.pt": [None, None, "weight", "model.bag.weight", "b", ""],
    "model.safetensors": [None, "bag.weight", "a"],
}


def check_table(path):
    table = jbag.load_table(path, random.choice(NAMES.get(path.name, [None])))
    assert isinstance(table, np.ndarray), type(table)
    assert table.ndim == 2, table.shape
    assert table.dtype.name in ("float32", "float64", "float16", "bfloat16"), (
        table.dtype
    )
    assert table.dtype.isnative, table.dtype
    path.write_bytes(b"")  # A mapped table would be gone now.
    assert table.tobytes() is not None


def check_encoder(encoder):
    assert all(isinstance(word, str) for word in encoder.words)
    if encoder.ngrams > 1000 or encoder.subwords[1] > 1000:
        return
    bags = encoder.encode(TEXTS)
    assert len(bags) == len(TEXTS)
    if bags.capacity:
        assert 0 <= bags.indices.min() <= bags.indices.max() < encoder.num_rows


def check_vocabulary(vocabulary):
    rows = np.arange(len(vocabulary)) + (vocabulary.unknown == "row")
    found = vocabulary.transform(vocabulary.inverse(rows))
    np.testing.assert_array_equal(getattr(found, "indices", found), rows)


def read(path):
    if path.name == "encoder.npz":
        check_encoder(jbag.text.Encoder.load(path))
    elif path.name == "vocabulary.npz":
        check_vocabulary(jbag.data.IdVocabulary.load(path))
    elif path.suffix in (".ftz", ".bin"):
        loaded = jbag.fasttext.load(path)
        assert loaded.table.shape[0] >= loaded.encoder.num_rows
        assert len(loaded.labels) == len(loaded.label_counts)
        check_encoder(loaded.encoder)
    elif path.suffix == ".vec":
        words, table = jbag.fasttext.load_vectors(path, random.choice([None, 0, 2]))
        assert table.shape[0] == len(words) == len(set(words))
        assert table.dtype == np.float32
    else:
        check_table(path)


class TooSlowError(Exception):
    """A reader took too long."""


def give_up(*_):
    raise TooSlowError(f"over {SECONDS} s")


def run(path):
    """Return what became of a file: "read", or the kind of the error."""
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read(path)
        result = "read"
    except (ValueError, OSError) as error:
        if path.name not in str(error):
            raise
        result = type(error).__name__
    finally:
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MB for a file"
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="*", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--keep", type=Path, default=Path("fuzzed"), help="failures")
    args = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # of zipfile, NumPy and PyTorch, about what is odd
    seeds = [(kind, *file) for kind in args.formats for file in SEEDS[kind]()]
    counts, failures = Counter(), Counter()
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as directory:
        for number in itertools.count(args.seed):
            if time.monotonic() > deadline:
                break
            rng = random.Random(number)
            random.seed(number)
            kind, name, data = seeds[number % len(seeds)]
            for _ in range(rng.choice([1, 1, 1, 2, 4])):
                data = rng.choice(CHANGES)(rng, data or b"\0")
            path = Path(directory) / name
            path.write_bytes(data)
            try:
                counts[kind, run(path)] += 1
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                key = (kind, type(error).__name__, f"{where.filename}:{where.lineno}")
                failures[key] += 1
                if failures[key] == 1:
                    args.keep.mkdir(exist_ok=True)
                    (args.keep / f"{number}-{name}").write_bytes(data)
                    print(f"{number} {name}: {type(error).__name__}: {error}")
    for (kind, result), count in sorted(counts.items()):
        print(f"{kind:12} {result:20} {count:7}")
    print(f"{sum(counts.values())} files, {sum(failures.values())} failures")
    for key, count in failures.most_common():
        print(count, *key)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())

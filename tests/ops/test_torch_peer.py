"""PyTorch as a peer: its own operator samples, and ragged batches at random."""

import jax
import numpy as np
import oracle
import pytest
from slow import slow

import jbag

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


MODES = ("sum", "mean", "max")


S, M = 5, 10


def samples():
    """Yield (V, indices, options) as PyTorch's tests of its operator choose them."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, high=M: rng.integers(0, high, shape)
    for mode in MODES:
        for weighted in (False, True):
            if weighted and mode != "sum":
                continue  # PyTorch weights sums alone
            common = {"mode": mode, "weighted": weighted}
            yield M, draw(S), {"offsets": [0, 3], **common}
            yield M, draw(2 * S)[::2], {"offsets": [0, 3], **common}
            yield M, draw(S), {"offsets": [0, 0, 3], **common}
            yield M, draw(S, S), common
            padded = draw(6, high=S)
            padded[[0, 4]] = 4
            yield S, padded, {"padding_idx": -1, "offsets": [0, 3], **common}
            square = draw(3, 3, high=S)
            square[[0, 1], [0, 1]] = 2
            yield S, square, {"padding_idx": 2, **common}
            last = {"offsets": [0, 3, 6], "include_last_offset": True}
            yield S, draw(6, high=S), {**last, **common}
            yield S, draw(2, 2, high=S), {"max_norm": 1.0, **common}
            norms = {"max_norm": 1.0, "norm_type": 1.0, "offsets": [0, 3]}
            yield S, draw(6, high=S), {**norms, **common}
            if mode != "max":
                yield S, draw(2, 2, high=S), {"scale_grad_by_freq": True, **common}

                # Where an id repeats before the last one, PyTorch 2.13 divides the rows
                # after it by another row's count on CPU: it is no oracle there.


def pooled(sample, dtype):
    """Return arguments of a pool, its options, and what PyTorch makes of them.

    That is a value and gradients. The arguments are a table, indices, offsets, weights
    and a cotangent.
    """
    num_embeddings, indices, options = sample
    options = dict(options)
    rng = np.random.default_rng(1)
    # Of norm above 1, so that max_norm has something to do.
    table = (rng.normal(size=(num_embeddings, S)) * 2).astype(dtype)
    weights = rng.normal(size=indices.shape).astype(dtype)
    weighted = options.pop("weighted")
    offsets = options.pop("offsets", None)

    peer = torch.tensor(table, requires_grad=True)
    peer_weights = torch.tensor(weights, requires_grad=True) if weighted else None
    # max_norm writes into the weight in place: give it a copy that isn't a leaf's.
    used = peer if "max_norm" not in options else torch.tensor(table)
    value = torch.nn.functional.embedding_bag(
        torch.tensor(indices),
        used.requires_grad_(),
        offsets=None if offsets is None else torch.tensor(offsets),
        per_sample_weights=peer_weights,
        **options,
    )
    cotangent = rng.normal(size=value.shape).astype(dtype)
    value.backward(torch.tensor(cotangent))
    expected = [value.detach(), used.grad]
    expected += [peer_weights.grad] if weighted else []
    args = table, indices, offsets, weights if weighted else None, cotangent
    return args, options, [x.numpy() for x in expected]


def check(cases, implementation):
    """Compare all cases with PyTorch, as one program computes them."""

    def results(table, weights, cotangent, indices, offsets, options):
        value, pullback = jax.vjp(
            lambda t, w: jbag.embedding_bag(
                t, indices, offsets, weights=w, implementation=implementation, **options
            ),
            table,
            weights,
        )
        return value, *pullback(cotangent)

    @jax.jit
    def run(every):
        return [
            results(*arrays, *args[1:3], options)
            for arrays, (args, options, _) in zip(every, cases, strict=True)
        ]

    found = run([(args[0], args[3], args[4]) for args, *_ in cases])
    for actual, (_, options, expected) in zip(found, cases, strict=True):
        for x, wanted in zip(actual, expected, strict=False):
            np.testing.assert_allclose(
                x, wanted, **oracle.TOLERANCES[x.dtype.name], err_msg=str(options)
            )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", *slow("float64")])
def test_operator_samples_equal_pytorch(mode, dtype, implementation):
    with jax.enable_x64(True):
        own = [sample for sample in samples() if sample[2]["mode"] == mode]
        assert len(own) > 8
        check([pooled(sample, dtype) for sample in own], implementation)


@pytest.mark.parametrize("seed", range(3))
def test_random_ragged_batches_equal_pytorch(seed, implementation):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 7, 20)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    indices = rng.integers(0, 30, lengths.sum())
    options = {"padding_idx": 3, "offsets": offsets, "weighted": False}
    cases = [
        pooled((30, indices, options | {"mode": mode}), np.float32) for mode in MODES
    ]
    check(cases, implementation)

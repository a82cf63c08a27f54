"""Bad input raises, in the words: name, expectation, finding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbag

TABLE = jnp.ones((10, 3))
IDS = [0, 1, 2, 3, 4, 5]
OFFSETS = [0, 2, 4]


def pool(*args, **options):
    return jbag.embedding_bag(*args, **options)


def as_list(x):
    return x


@pytest.mark.parametrize("convert", [as_list, np.asarray, jnp.asarray])
def test_weights_of_another_shape(convert):
    expected = r"`weights` must have the shape of `indices`, \(6,\); got \(5,\)\."
    with pytest.raises(ValueError, match=expected):
        pool(TABLE, convert(IDS), convert(OFFSETS), weights=convert([1.0] * 5))
    with pytest.raises(ValueError, match="`weights` must have the shape"):
        pool(TABLE, convert([IDS]), weights=convert([1.0] * 6))


def test_weights_that_are_not_floating():
    for weights in (np.ones(6, int), jnp.ones(6, int), np.ones(6, bool)):
        with pytest.raises(
            TypeError, match=r"`weights` must be floating; got (int|bool)"
        ):
            pool(TABLE, IDS, OFFSETS, weights=weights)
    for invalid in (None, "1.0"):
        with pytest.raises(TypeError, match=r"`weights` must be .* at position 5"):
            pool(TABLE, IDS, OFFSETS, weights=[1.0] * 5 + [invalid])


def test_lists_of_whole_numbers_are_weights():
    out = pool(TABLE, IDS, OFFSETS, weights=[1, 2, 3, 4, 5, 6], mode="sum")
    np.testing.assert_array_equal(out[:, 0], [3, 7, 11])


@pytest.mark.parametrize("convert", [as_list, np.asarray])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 4, 2], r"must not decrease; got 4 then 2 at position 2"),
        ([1, 4], r"must start at 0; got 1"),
        ([-1, 4], r"must start at 0; got -1"),
        ([0, 7], r"must not pass the end of `indices`, 6; got 7 at position 1"),
        ([0, 2**40], r"must not pass the end of `indices`, 6; got 1099511627776"),
        ([], r"must start at 0; got an empty array"),
    ],
)
def test_malformed_offsets_on_the_host(offsets, message, convert):
    if not offsets and convert is np.asarray:
        offsets = np.zeros(0, int)
    with pytest.raises(ValueError, match="`offsets` " + message):
        pool(TABLE, IDS, convert(offsets))
    with pytest.raises(ValueError, match="`offsets` "):
        pool(TABLE, IDS, convert(offsets), include_last_offset=True)
    with pytest.raises(ValueError, match="`offsets` "):
        jbag.Bags.from_offsets(IDS, convert(offsets))


def test_malformed_offsets_on_the_host_beside_ids_on_a_device():
    with pytest.raises(ValueError, match="`offsets` must not decrease"):
        jax.jit(lambda ids: pool(TABLE, ids, [0, 4, 2]))(jnp.array(IDS))


@pytest.mark.parametrize("convert", [as_list, np.asarray, jnp.asarray])
def test_offsets_and_indices_of_wrong_shapes(convert):
    with pytest.raises(
        ValueError, match=r"`offsets` must be None with indices \[B, L\]"
    ):
        pool(TABLE, convert([IDS]), convert(OFFSETS))
    with pytest.raises(ValueError, match="`offsets` must be given with indices"):
        pool(TABLE, convert(IDS))
    with pytest.raises(ValueError, match=r"`offsets` must be 1-D; got shape \(1, 3\)"):
        pool(TABLE, convert(IDS), convert([OFFSETS]))
    for indices in (3, [[[1]]]):
        with pytest.raises(ValueError, match=r"`indices` must be \[N\] or \[B, L\]"):
            pool(TABLE, convert(indices), convert(OFFSETS))


@pytest.mark.parametrize("convert", [as_list, np.asarray, jnp.asarray])
def test_indices_that_are_not_integers(convert):
    for indices in ([1.0, 2.0], [True, False]):
        with pytest.raises(TypeError, match="`indices` must hold integers; got"):
            pool(TABLE, convert(indices), [0])
    with pytest.raises(TypeError, match="`offsets` must hold integers; got float"):
        pool(TABLE, IDS, convert([0.0, 2.0]))


@pytest.mark.parametrize("invalid", [None, "3", b"3", [1], {}, 1.5j])
def test_lists_that_hold_no_numbers(invalid):
    with pytest.raises((TypeError, ValueError), match="`indices`"):
        pool(TABLE, [1, invalid, 2], [0])
    with pytest.raises((TypeError, ValueError), match="`indices`"):
        pool(TABLE, [[1, invalid, 2]])
    with pytest.raises((TypeError, ValueError), match="`ids`"):
        jbag.Bags.from_lists([[1], [1, invalid, 2]])


@pytest.mark.parametrize("invalid", [None, "3"])
def test_invalid_elements_are_named_with_their_position(invalid):
    with pytest.raises(TypeError, match=f"integers.* with {invalid!r} at position 1"):
        pool(TABLE, [1, invalid, 2], [0])
    with pytest.raises(
        TypeError, match=rf"numbers; got {invalid!r} at `ids\[1\]\[1\]`"
    ):
        jbag.Bags.from_lists([[1], [1, invalid, 2]])


@pytest.mark.parametrize("whole", [None, "abc", b"abc", {}, {1, 2}])
def test_values_that_are_no_indices(whole):
    with pytest.raises(TypeError, match="`indices` must hold integers"):
        pool(TABLE, whole, [0])


def test_lists_of_different_lengths_point_to_bags():
    with pytest.raises(ValueError, match=r"different lengths. jbag.Bags.from_lists"):
        pool(TABLE, [[1, 2], [3]])


@pytest.mark.parametrize("convert", [as_list, np.asarray])
def test_an_id_out_of_range_on_the_host(convert):
    message = r"`indices` must lie in \[0, 10\), the rows of the table; got {} at {}"
    with pytest.raises(IndexError, match=message.format(10, "position 1")):
        pool(TABLE, convert([0, 10, 11]), [0])
    with pytest.raises(IndexError, match=message.format(-1, "position 2")):
        pool(TABLE, convert([0, 9, -1]), [0])
    with pytest.raises(IndexError, match=message.format(2**40, "position 0")):
        pool(TABLE, convert([2**40]), [0])
    with pytest.raises(IndexError, match=message.format(99, r"position \(1, 0\)")):
        pool(TABLE, convert([[1, 2], [99, 98]]))
    with pytest.raises(IndexError, match=message.format(10, "position 1")):
        pool(TABLE, jbag.Bags.from_lists([[0], [10]]))
    with pytest.raises(IndexError, match=message.format(10, "position 1")):
        jax.jit(lambda t: pool(t, convert([0, 10]), [0]))(TABLE)


def test_an_id_out_of_range_on_the_host_by_offsets_on_a_device():
    # Whether it is in a bag can't be seen: it is NaN if it is, and never wraps.
    for invalid in (99, 2**40):
        ids = np.array([0, invalid])
        out = pool(TABLE, ids, jnp.array([0, 1, 2]), include_last_offset=True)
        np.testing.assert_array_equal(np.isnan(out).all(1), [False, True])
        out = pool(TABLE, ids, jnp.array([0, 1]), include_last_offset=True)
        np.testing.assert_array_equal(out, [[1, 1, 1]])


def test_masked_arrays_are_not_taken_for_plain_ones():
    with pytest.raises(
        TypeError, match="`indices` must be a plain array; got a masked"
    ):
        pool(TABLE, np.ma.masked_array([[1, 2]], mask=[[False, True]]))


def test_a_norm_that_is_none_on_a_device_shows():
    for max_norm in (jnp.float32(-1), jnp.float32(jnp.nan)):
        assert np.isnan(pool(TABLE, IDS, [0], max_norm=max_norm)).all()


def test_an_id_out_of_range_in_the_tail_is_nothing():
    out = pool(TABLE, [0, 1, 99], [0, 2], include_last_offset=True)
    np.testing.assert_array_equal(out, [[1, 1, 1]])


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_a_table_that_is_not_floating(dtype):
    with pytest.raises(TypeError, match=f"`table` must be a matrix of .*; got {dtype}"):
        pool(jnp.ones((3, 2), dtype), IDS, [0])
    with pytest.raises(TypeError, match="`table`"):
        pool("table", IDS, [0])
    with pytest.raises(TypeError, match="`table`"):
        pool(None, IDS, [0])


def test_arguments_in_the_order_of_pytorch():
    with pytest.raises(TypeError, match=r"arguments in PyTorch's order\?"):
        pool(jnp.array(IDS), TABLE, jnp.array(OFFSETS))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_a_table_that_is_no_matrix(shape):
    with pytest.raises(
        ValueError, match=r"`table` must be a matrix \[V, D\]; got shape"
    ):
        pool(jnp.ones(shape), IDS, [0])


def test_unknown_modes_and_implementations():
    for mode in ("average", None, 3, ["sum"], np.array(["sum", "max"])):
        with pytest.raises(ValueError, match="`mode` must be one of 'sum', 'mean'"):
            pool(TABLE, IDS, [0], mode=mode)
    with pytest.raises(
        ValueError,
        match="must be None or one of 'cpu', 'cuda', 'sparsecore', 'tensorcore', 'xla_",
    ):
        pool(TABLE, IDS, [0], implementation="triton")
    with pytest.raises(ValueError, match="`implementation` must be None or one of"):
        pool(TABLE, IDS, [0], implementation=["xla"])


def test_padding_idx_that_is_no_row():
    for padding_idx in (10, -11):
        with pytest.raises(ValueError, match=r"`padding_idx` must be in \[-10, 10\)"):
            pool(TABLE, IDS, [0], padding_idx=padding_idx)
    for padding_idx in (1.0, "1", True):
        with pytest.raises(TypeError, match="`padding_idx` must be an integer"):
            pool(TABLE, IDS, [0], padding_idx=padding_idx)


def test_norms_that_are_none():
    with pytest.raises(ValueError, match="`max_norm` must be at least 0; got -1"):
        pool(TABLE, IDS, [0], max_norm=-1)
    with pytest.raises(ValueError, match="`max_norm` must be at least 0; got nan"):
        pool(TABLE, IDS, [0], max_norm=float("nan"))
    with pytest.raises(
        ValueError, match=r"`max_norm` must be one number; got shape \(2"
    ):
        pool(TABLE, IDS, [0], max_norm=jnp.ones(2))
    with pytest.raises(TypeError, match="`max_norm` must be a number; got '1'"):
        pool(TABLE, IDS, [0], max_norm="1")
    for invalid in (
        np.array(1j),
        np.array(True),
        np.array("1"),
        True,
        jnp.array(True),
    ):
        with pytest.raises(TypeError, match="`max_norm` must be a number; got"):
            pool(TABLE, IDS, [0], max_norm=invalid)
    for norm_type in (0, -2.0):
        with pytest.raises(ValueError, match="`norm_type` must be above 0"):
            pool(TABLE, IDS, [0], max_norm=1.0, norm_type=norm_type)
    with pytest.raises(TypeError, match="`norm_type` must be a number"):
        pool(TABLE, IDS, [0], norm_type="2")


@pytest.mark.parametrize(
    "flag", ["include_last_offset", "scale_grad_by_freq", "sparse"]
)
def test_flags_that_are_none(flag):
    with pytest.raises(TypeError, match=f"`{flag}` must be True or False; got 1"):
        pool(TABLE, IDS, [0], **{flag: 1})


def test_bags_with_what_they_bring_themselves():
    bags = jbag.Bags.from_lists([[1, 2], [3]], [[1.0, 2.0], [3.0]])
    with pytest.raises(ValueError, match="`offsets` must be None with a Bags"):
        pool(TABLE, bags, [0, 2])
    with pytest.raises(ValueError, match="`weights` must be None with a Bags"):
        pool(TABLE, bags, weights=[1.0, 2.0, 3.0])
    stacked = jax.tree.map(lambda x: np.stack([x, x]), bags)
    with pytest.raises(ValueError, match=r"`bags` must be one batch.* use jax\.vmap"):
        pool(TABLE, stacked)


def test_bags_take_weights_that_they_lack():
    bags = jbag.Bags.from_lists([[1, 2], [3]])
    out = pool(TABLE, bags, weights=[1.0, 2.0, 3.0], mode="sum")
    np.testing.assert_array_equal(out[:, 0], [3, 3])

"""`bucket`: rounds capacities to few sizes, which limits compilations.

A capacity is N, the number of slots of a batch. `jbag/data/_order.py` computes the
capacity of an epoch, in `epoch_capacity`. Bags are not sorted into buckets by
length: a ragged batch does not pad its bags.
"""

from __future__ import annotations

from jbag._validation import check_integer


def bucket(n: int, minimum: int = 64) -> int:
    r"""Round a capacity up to 4, 5, 6 or 7 times a power of two.

    It adds at most a quarter. Batches of up to N slots have about
    :math:`4 \log_2(N / \text{minimum})` different capacities, each compiled once.

    Args:
      n: the number of slots in use, at least 0.
      minimum: the smallest capacity, a power of two, at least 4.

    Returns:
      The capacity.

    Raises:
      TypeError: an argument is not an integer.
      ValueError: an argument is too small, or `minimum` is not a power of two.

    Example:
      >>> [jbag.bucket(n) for n in (3, 65, 1000, 1025)]
      [64, 80, 1024, 1280]
    """
    n = check_integer("n", n, low=0)
    minimum = check_integer("minimum", minimum, low=4)
    if minimum & (minimum - 1):
        raise ValueError(f"`minimum` must be a power of two; got {minimum}.")
    if n <= minimum:
        return minimum
    step = 1 << ((n - 1).bit_length() - 3)
    return -(-n // step) * step

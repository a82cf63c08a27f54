"""`bucket`: capacities of few sizes, so that few shapes are compiled."""

from __future__ import annotations

from jbag._validation import check_integer


def bucket(n: int, minimum: int = 64) -> int:
    """Round a capacity up to one of few: 4, 5, 6 or 7 times a power of two.

    At most a quarter is added, and a stream of batches of sizes up to N meets about
    4 * log2(N / minimum) shapes, each of which is compiled once.

    Args:
      n: the number of slots needed, at least 0.
      minimum: the smallest capacity, a power of two, at least 4.

    Raises:
      TypeError, ValueError: `n` or `minimum` is no such number.

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

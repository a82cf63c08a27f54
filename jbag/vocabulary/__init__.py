"""A vocabulary that grows inside a jitted step: 64-bit ids to rows of a table.

A training step and a prediction::

    vocabulary = jbag.vocabulary.Vocabulary(1_000_000, eviction="lru")
    state = vocabulary.init()
    ...
    rows, state = vocabulary.assign(state, ids, step)               # in training
    table, opt_state = jbag.vocabulary.reset_rows(                  # in the same step
        vocabulary.new_rows(state, rows.size), table, opt_state,
        optimizer=optimizer, key=key, initializer=jax.nn.initializers.normal(),
    )
    rows = vocabulary.lookup(state, ids)                            # in serving

It is a hash table without collisions: two ids with rows never share one. It follows the
multi-probe zero-collision hashing of TorchRec (MPZCH). `assign` and `lookup` are pure
functions with static shapes. Their results don't depend on the order of the ids in a
batch, on the platform, or on the number of devices that hold the buckets.

Ids are integers of up to 64 bits, without 64-bit arrays on the device: `split_ids`
makes two words of them. `jbag.text.hash_strings` makes ids of strings.
"""

from jbag.vocabulary._reset_rows import reset_rows
from jbag.vocabulary._split_ids import SplitIds, split_ids
from jbag.vocabulary._state import Statistics, VocabularyState
from jbag.vocabulary._vocabulary import FullVocabularyError, Vocabulary

__all__ = [
    "FullVocabularyError",
    "SplitIds",
    "Statistics",
    "Vocabulary",
    "VocabularyState",
    "reset_rows",
    "split_ids",
]

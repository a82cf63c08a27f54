"""Batches of one static shape, so that a training step compiles once.

A data set has n examples: one `Bags` on the host, or a dict of features, each a `Bags`
or ids [n, L]; and a tree of arrays [n, ...]. `batches` shuffles the examples and packs
them into batches:

    >>> texts = jbag.Bags.from_lists([[1, 2], [3], [4, 5, 6]])
    >>> labels = np.array([0, 1, 1])
    >>> stream = jbag.data.batches(texts, labels, batch_size=2, seed=0, prefetch=2)
    >>> for epoch in range(2):
    ...     for batch in stream.at(epoch):
    ...         print(epoch, batch.bags.num_bags, batch.bags.capacity, batch.mask)
    0 2 64 [ True  True]
    0 2 64 [ True False]
    1 2 64 [ True  True]
    1 2 64 [ True False]

For Grain, which has its own shuffling, transformations, workers and checkpoints,
`Source` reads the examples and `Collate` packs them::

    pipeline = (
        grain.MapDataset.source(jbag.data.Source(texts, labels))
        .seed(0)
        .shuffle()
        .batch(256, batch_fn=jbag.data.Collate(256))
        .to_iter_dataset()
    )

By default no example is dropped: empty bags pad the last batch, and `Batch.mask` marks
them. `predict` applies a function to all batches and leaves padding out.

`IdVocabulary` maps raw ids to rows, and `histories` returns the last items of a user
before each event.
"""

from jbag.data._batches import Batches, batches
from jbag.data._grain import Collate, Example, Source
from jbag.data._histories import histories
from jbag.data._id_vocabulary import IdVocabulary
from jbag.data._pack_examples import Batch
from jbag.data._predict import predict

__all__ = [
    "Batch",
    "Batches",
    "Collate",
    "Example",
    "IdVocabulary",
    "Source",
    "batches",
    "histories",
    "predict",
]

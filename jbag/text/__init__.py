"""Encode texts as bags of table rows: words, hashed n-grams of words and characters.

    encoder, bags = jbag.text.Encoder.fit_encode(texts, ngrams=2, buckets=1 << 21)
    table = jnp.zeros((encoder.num_rows, features))
    pooled = jbag.embedding_bag(table, bags)
    ...
    bags = encoder.encode(other_texts)

Hashes and rows are those of fastText (Joulin et al., "Bag of Tricks for Efficient Text
Classification", 2016; Bojanowski et al., "Enriching Word Vectors with Subword
Information", 2017). The rows of the words come first, by descending frequency. The
`buckets` rows after them are shared by the n-grams.

`hash_strings` hashes whole strings, such as the names of items, to 64-bit ids.
"""

from jbag.text._encoder import Encoder
from jbag.text._string_hash import hash_strings

__all__ = [
    "Encoder",
    "hash_strings",
]

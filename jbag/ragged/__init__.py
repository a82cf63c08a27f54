"""Ragged batches: `Bags`, offsets, segment ids, padding, lists and concatenation.

Private: `jbag` exports the public names.
"""

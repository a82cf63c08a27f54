"""Ragged batches: `Bags`, offsets, segment ids, padding, lists and concatenation."""

"""Ragged batches: `Bags`, offsets, segment ids, padding, packing and concatenation."""

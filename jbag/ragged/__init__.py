"""Ragged batches: bags of ids, their offsets and padding, and how they are packed."""

"""Readers and writers of PyTorch, NumPy, safetensors and Flax formats.

Private: `jbag` exports the public names.
"""

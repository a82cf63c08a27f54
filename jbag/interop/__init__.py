"""Readers and writers of PyTorch, NumPy, safetensors and Flax formats."""

"""Tables and states of other libraries: PyTorch, NumPy, safetensors, Flax."""

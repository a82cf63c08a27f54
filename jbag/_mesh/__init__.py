"""Sharding over a device mesh: specs, row layouts, all-to-all, gradients.

Private: `jbag` exports the public names.
"""

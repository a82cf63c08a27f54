"""The embedding bag and the sparse matrix operations that it consists of.

Private: `jbag` exports the public names.
"""

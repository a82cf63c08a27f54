"""The embedding bag and the operations that it consists of."""

"""The operators in plain PyTorch, forward and backward, for any device; and their twins, the specification."""

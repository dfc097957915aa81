"""Where no GPU is at hand, Triton's kernels run in its interpreter; it has to know before anything imports it."""

import os

# Two processes whose threads share the cores wait for each other: one thread for each, and for what they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

"""Tests of the Triton code in its CPU interpreter, which has to be chosen before triton is imported and then serves the
whole process: tests/kernels/test_triton.py runs this folder in a process of its own."""

import os

import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
torch.set_num_threads(1)

"""Measures the CUDA backend: correctness first, then the kernels, the link and whole models. Runs at toy sizes without a GPU."""

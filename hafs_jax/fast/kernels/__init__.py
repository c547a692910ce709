"""Kernels for NVIDIA GPUs from Hopper on: sparse products, whose plain twins are in `hafs_jax.fast.entries`, and the
decoder's update, whose twin is in `hafs_jax.fast.adam`.

They are written in Pallas for its Mosaic GPU backend. On a CPU they run in interpret mode, for tests. Each output is
written once, by one program, in a fixed order of sums: there are no atomics, so two trainings end with the same bits.
"""

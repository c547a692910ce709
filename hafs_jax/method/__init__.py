"""The method in its plain form, as the paper would print it: the SAE, its architectures, its loss, the penalty.

Pure functions. Nothing here asks for a backend, a number of cores or a file. `hafs_jax.fast` computes the same values
faster, and a test holds each fast form to the plain one here.
"""

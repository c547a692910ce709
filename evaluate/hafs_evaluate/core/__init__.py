"""Reconstruction, sparsity, geometry, and the language model with the SAE spliced in."""

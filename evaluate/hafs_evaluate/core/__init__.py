"""What needs no labels: reconstruction, sparsity, dictionary geometry, and the language model with the SAE in it.

`encode` is the one way in which all evaluations run an SAE.
"""

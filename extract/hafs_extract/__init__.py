"""Room one: a language model's activations, from text to a store on disk (PyTorch, never JAX)."""

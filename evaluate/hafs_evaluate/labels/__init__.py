"""What latents are called: a file of labels that people and language models fill. Imports no torch and no jax."""

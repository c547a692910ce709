"""Single latents: what they fire on, with and for, what they detect, and how alike they are across runs."""

"""Single latents: where they fire, with what, for what, and how alike they are across runs."""

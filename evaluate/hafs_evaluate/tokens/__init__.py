"""Properties that a token's id decides, and how well latents that were chosen on some of its tokens find the others."""

"""Synthetic worlds of known features, and stores sampled from them."""

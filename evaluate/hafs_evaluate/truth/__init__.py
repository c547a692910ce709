"""Scores against a synthetic world's true features."""

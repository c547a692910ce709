"""Experiments: what is trained, compared and concluded."""

"""The rows that a training reads."""

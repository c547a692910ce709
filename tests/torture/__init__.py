"""Kills, signals, failing disks, power losses: what a command leaves, and whether the same command mends it.

Each subject is a module with a function `run(cases, seed)`, which returns the cases that went wrong. A case's numbers
depend on its subject, the seed and its own number alone.
"""

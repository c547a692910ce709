"""Training: the state, the compiled step, the loop, sweeps, data, checkpoints and logs."""

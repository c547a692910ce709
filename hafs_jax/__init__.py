"""Room two: training sparse autoencoders on activation stores in JAX, and HAFS (never torch)."""

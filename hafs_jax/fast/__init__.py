"""The same values as `hafs_jax.method`, computed more quickly. Each module names its plain twin."""

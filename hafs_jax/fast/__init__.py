"""The same values as `hafs_jax.method`, computed faster. Each module names its plain twin."""

"""`python -m hafs_jax` is `hafs`."""

from hafs_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

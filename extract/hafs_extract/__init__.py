"""From text to a store of a language model's activations (PyTorch, never JAX); adding a dataset or a profile."""

from hafs_extract.config import ExtractConfig, SourceConfig
from hafs_extract.profiles import Profile, register_dataset, register_profile

__all__ = ["ExtractConfig", "Profile", "SourceConfig", "register_dataset", "register_profile"]

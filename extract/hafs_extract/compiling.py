"""Whether the language model's blocks are compiled, which changes the last bits of what they compute."""

import logging

from hafs_extract.config import ExtractConfig
from hafs_extract.models import LanguageModel
from hafs_jax.base.errors import UserError

LOG = logging.getLogger(__name__)

COMPILED_FROM_TOKENS = 1_000_000  # on two cores, compiling takes 20 s once and saves 30 s per million tokens


def compile_blocks(config: ExtractConfig, model: LanguageModel, rows: int) -> bool:
    """Compiles the blocks where the config says so, or has "auto" and `rows` are at least COMPILED_FROM_TOKENS.

    Returns whether it did. Raises `UserError` where the config says "on" and it cannot be done.
    """
    if config.compile == "off" or (config.compile == "auto" and rows < COMPILED_FROM_TOKENS):
        return False
    shape = config.batch_tokens // config.context_length, config.context_length
    try:
        if not model.compiles(config.hook_points):
            raise UserError(f"hook point {config.hook_point} is not of the residual stream")
        if shape[0] < 2:
            raise UserError(f"batch_tokens={config.batch_tokens} is less than two contexts of {shape[1]} tokens")
        LOG.info("compiling the model's blocks (--compile off leaves them as they are)")
        model.compile_blocks(config.hook_points, shape)
    except UserError as error:
        if config.compile == "on":
            raise UserError(f"compile=on: {error}; pass --compile auto, and --force to begin anew") from error
        LOG.info(f"the model's blocks are not compiled: {error}")
        return False
    return True

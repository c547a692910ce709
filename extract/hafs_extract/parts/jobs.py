"""What workers are told. Standard library and numpy only."""

from dataclasses import dataclass

from hafs_extract.config import ExtractConfig
from hafs_extract.parts.plan import Part
from hafs_jax.store.manifest import ModelInfo

TOKEN = "token"


@dataclass(frozen=True)
class Job:
    """A part that is to be made."""

    split: str
    text: str  # the folder of the split's text
    folder: str  # of its parts
    part: Part


@dataclass(frozen=True)
class Setup:
    """What a worker is told before its first job."""

    config: ExtractConfig
    widths: tuple[int, ...]  # of the hook points' activations
    model: ModelInfo  # which it must find too
    has_bos: bool
    rows: int  # of the whole extraction, which decide whether the model is compiled
    folder: str  # that all workers share
    token: str = ""  # what the file TOKEN there holds
    threads: int | None = None  # of torch on a CPU; None: as torch chooses

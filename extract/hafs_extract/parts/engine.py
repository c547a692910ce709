"""Which engine makes an extraction's parts, and with how many workers. Standard library only."""

import importlib.util
from dataclasses import dataclass

from hafs_jax.base.errors import UserError, arg
from hafs_jax.base.options import check, option

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Engine:
    """What runs the model, which does not change the stores: it is no part of their config."""

    engine: str = option("local", "what runs the model: processes of this machine, or a Ray cluster", choices=ENGINES)
    workers: int | None = option(
        None,
        "processes that run the model; none: with local this one alone, with ray one for each GPU of the cluster, or "
        "for each machine if there are none",
        least=1,
        most=65_536,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise UserError(
                f"{arg('engine', 'ray')} needs the package ray, which is not installed: pip install"
                " 'hafs-jax[extract-ray]'"
            )

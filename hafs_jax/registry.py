"""Functions that add an architecture, a penalty or a variant from outside the library.

    import jax
    from hafs_jax import Architecture, register_architecture
    from hafs_jax.method.architectures import l1

    def squared(pre_BF, params, config, at):
        return jax.nn.relu(pre_BF) ** 2

    register_architecture("squared", Architecture(squared, cost=l1))

After that the name works wherever a built-in name works. To have it on the command line too, put such calls into a
module and name the module in the environment variable HAFS_PLUGINS: every `hafs` command then imports it.
"""

import re
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.config import PENALTY_KINDS
from hafs_jax.fast.forms import FORMS, Form
from hafs_jax.method import architectures, penalties
from hafs_jax.method.architectures import Architecture, l1
from hafs_jax.method.penalties import Penalty
from hafs_jax.presets import ARCHITECTURES, VARIANTS, Fields


def register_architecture(
    name: str, architecture: Architecture, preset: Fields | None = None, form: Form | None = None
) -> None:
    """Adds an architecture under `name`.

    - `architecture`: its functions and facts.
    - `preset`: what it changes from the default config.
    - `form`: how to compute it faster. Without a form all its products are dense.

    Raises `UserError` if the name is not an identifier or belongs to another architecture. Raises it too if the form
    multiplies by active latents alone and the cost is neither `l1` nor None.
    """
    _check_name("architecture", name, architectures.ARCHITECTURES, architecture)
    if form is not None and form.select is not None and architecture.cost not in (None, l1):
        raise UserError(
            f"architecture {name!r}: expected cost l1, or none, with a form that selects active latents, found another "
            "cost; leave out form.select"
        )
    architectures.ARCHITECTURES[name] = architecture
    ARCHITECTURES[name] = dict(preset or {})
    if form is not None:
        FORMS[name] = form


def register_penalty(name: str, penalty: Penalty, variant: Fields | None = None) -> None:
    """Adds a penalty as a value of `penalty.kind`, and a variant of the same name that uses it.

    `variant` holds further fields of that variant, such as its strength `penalty.lam_max`. Raises `UserError` if the
    name is not an identifier or belongs to another penalty or variant.
    """
    _check_name("penalty", name, penalties.PENALTIES, penalty)
    penalties.PENALTIES[name] = penalty
    if name not in PENALTY_KINDS:
        PENALTY_KINDS.append(name)
    fields = dict(variant or {})
    register_variant(name, {**fields, "penalty": {"kind": name, **fields.get("penalty", {})}})


def register_variant(name: str, fields: Fields) -> None:
    """Adds a variant under `name`. `fields`: what it changes from the baseline's config, as in `hafs_jax.VARIANTS`."""
    _check_name("variant", name, VARIANTS, fields)
    VARIANTS[name] = fields


def _check_name(what: str, name: str, known: dict[str, Any], value: Any) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"{what} {name!r}: expected a name of lower-case letters, digits and underscores that starts with a letter"
        )
    if known.get(name, value) != value:
        raise UserError(f"{what} {name!r}: expected a new name, found another {what} with this name; choose another")

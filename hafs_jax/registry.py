"""Adding an architecture, a penalty or a variant from outside the library.

    import jax
    from hafs_jax import Architecture, register_architecture

    def squared(pre_BF, params, config, at):
        return jax.nn.relu(pre_BF) ** 2

    register_architecture("squared", Architecture(squared, cost=l1))

The name then serves everywhere that a built-in one does. A module that does so can be named in the environment variable
HAFS_PLUGINS, so that every `hafs` command imports it.
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
    """Adds an architecture: its functions, what it changes from the default config, and how to compute it faster.

    Without a `form` it is computed densely. Raises `UserError` where the name is taken by another architecture or is
    no name, and where the form multiplies by active latents alone while the cost is another than `l1`.
    """
    _check_name("architecture", name, architectures.ARCHITECTURES, architecture)
    if form is not None and form.select is not None and architecture.cost not in (None, l1):
        raise UserError(f"architecture {name!r}: expected cost l1, or none, with a form that selects active latents")
    architectures.ARCHITECTURES[name] = architecture
    ARCHITECTURES[name] = dict(preset or {})
    if form is not None:
        FORMS[name] = form


def register_penalty(name: str, penalty: Penalty, variant: Fields | None = None) -> None:
    """Adds a penalty as `penalty.kind`, and a variant of the same name, which uses it at strength `lam_max`.

    `variant`: further fields of that variant. Raises `UserError` where the name is taken by another penalty or variant.
    """
    _check_name("penalty", name, penalties.PENALTIES, penalty)
    penalties.PENALTIES[name] = penalty
    if name not in PENALTY_KINDS:
        PENALTY_KINDS.append(name)
    fields = dict(variant or {})
    register_variant(name, {**fields, "penalty": {"kind": name, **fields.get("penalty", {})}})


def register_variant(name: str, fields: Fields) -> None:
    """Adds a variant: a name for what it changes from the baseline's config, as in `hafs_jax.VARIANTS`."""
    _check_name("variant", name, VARIANTS, fields)
    VARIANTS[name] = fields


def _check_name(what: str, name: str, known: dict[str, Any], value: Any) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{what} {name!r}: expected lower-case letters, digits and _, the first a letter")
    if known.get(name, value) != value:
        raise UserError(f"{what} {name!r}: expected a new name, found another {what} of that name")

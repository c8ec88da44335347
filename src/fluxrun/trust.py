"""What a config from a stranger may not do: name foreign code, or steer Hydra before our code runs."""

from __future__ import annotations

import os

from fluxrun.errors import TrustError

TRUST_VARIABLE = "FLUXRUN_TRUST_CONFIG"
OWN_TARGETS = "fluxrun.options."


def trusted() -> bool:
    """Whether the command line (``--trust-config``) or the environment lifts the trust rule."""
    return os.environ.get(TRUST_VARIABLE, "") not in ("", "0", "false")


def check_target(target: str) -> None:
    """Refuse a ``_target_`` outside fluxrun's own option modules, before anything is imported."""
    if not target.startswith(OWN_TARGETS) and not trusted():
        raise TrustError(
            f"_target_ {target!r} is not one of fluxrun's own ({OWN_TARGETS}*): a config may not run foreign code; "
            f"if you trust it, pass --trust-config or set {TRUST_VARIABLE}=1"
        )

"""Where the soak tests' moments come from."""

from __future__ import annotations

import os
import random
from functools import cache


@cache
def seed_of_run() -> int:
    """The seed of this run, drawn anew unless `$OPTIMD_SOAK_SEED` gives one."""
    seed = int(_GIVEN) if _GIVEN else random.SystemRandom().getrandbits(32)
    print(f"OPTIMD_SOAK_SEED={seed}")
    return seed


# When it is imported: the fixture that keeps the environment from tests comes later.
_GIVEN = os.environ.get("OPTIMD_SOAK_SEED")

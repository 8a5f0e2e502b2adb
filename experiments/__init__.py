"""Commands that test the claims of the paper, and the demo."""

import sys

from ant_jax.runtime import extras

for _extra in ("training", "experiments"):
    if _error := extras.missing(_extra):
        sys.exit(str(_error))

"""Multi-task methods that are no weightings of `combine`.

Each is an `optax.experimental.aggregating.Aggregator` of its own, the function ``graddrop`` of
``graddrop.py``, and is here and in `ant_jax.mtl` too. It stands where `combine` stands, in front of
any optimizer, takes the same arguments ``losses`` and ``counts``, and with ``axis_name`` works on
this device's 1/n of the entries, as `combine` does. Only ``init`` of those that keep gradients
differs: it must run under the mapped axis.

If a gradient or a loss is not finite, the update is not finite and the state does not change.
"""

import sys

from optax.experimental import aggregating

from ant_jax import settings

_FOLDER, _MAKES = sys.modules[__name__], aggregating.Aggregator

__all__ = settings.names_in(_FOLDER, _MAKES)
globals().update({name: settings.resolve(_FOLDER, name, _MAKES) for name in __all__})

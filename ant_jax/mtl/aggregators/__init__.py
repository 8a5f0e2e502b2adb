"""Multi-task methods that choose no weights from losses and a Gram matrix.

Each is an `optax.experimental.aggregating.Aggregator`: the function ``graddrop`` of
``graddrop.py``, also in `ant_jax.mtl`. It replaces `combine` in front of any optimizer, and takes
the same arguments ``losses`` and ``counts``. With ``axis_name`` it works on this device's 1/n of
the entries, as `combine` does. The ``init`` of those that keep gradients must then run under the
mapped axis too.

If a gradient or a loss is not finite, the update is not finite and the state does not change.
"""

import sys

from optax.experimental import aggregating

from ant_jax import settings

_FOLDER, _MAKES = sys.modules[__name__], aggregating.Aggregator

__all__ = settings.names_in(_FOLDER, _MAKES)
globals().update({name: settings.resolve(_FOLDER, name, _MAKES) for name in __all__})

"""Commands that test the claims of the paper, and the demo."""

import signal
import sys

# While Python looks for the module of ``python -m``, the first argument is "-m".
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until the imports of the command are done, Ctrl-C exits without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from ant_jax.runtime import extras

for _extra in ("training", "experiments"):
    if _error := extras.missing(_extra):
        sys.exit(f"error: {_error}")

"""Commands that test the claims of the paper, and the demo."""

import importlib.util
import sys

for _module in ("matplotlib", "tqdm", "sklearn"):
    if importlib.util.find_spec(_module) is None:
        sys.exit(f"{_module} is not installed: pip install 'ant-jax[experiments]'")

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from pathlib import Path
import jax
from ant_jax.parallel import keep_programs
keep_programs(Path(sys.argv[1]))
jax.jit(lambda x: x * 2 + 1)(3.0)
"""


@pytest.mark.parametrize("known", [False, True])
def test_compiled_programs_are_kept_where_jax_knows_no_other_place(known, tmp_path):
    places = {"ours": tmp_path / "ours", "known": tmp_path / "known"}
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(places["known"]) if known else ""
    subprocess.run(
        [sys.executable, "-c", PROGRAM, places["ours"]],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=100,
    )
    kept = {
        name: place.exists() and len(list(place.iterdir())) > 0 for name, place in places.items()
    }
    assert kept == {"ours": not known, "known": known}

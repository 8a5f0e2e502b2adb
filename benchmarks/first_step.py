"""Seconds from the command to the first training step: ``python -m benchmarks.first_step``.

Starts ``python -m ant_jax.main`` as a user does, in a fresh workdir, first with no compiled program
kept and then with those of the start before. The parts are told apart by the lines that it logs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_JAX_CACHE = "JAX_COMPILATION_CACHE_DIR"

# Each part ends with the line that begins like this.
PARTS = {
    "imports": "train in ",
    "data and first state": "compiling the first step",
    "compilation and first step": "step ",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--starts", type=int, default=3, help="with kept programs")
    args = parser.parse_args()
    print("| start | " + " | ".join(PARTS) + " | together |")
    print("| --- |" + " --- |" * (len(PARTS) + 1))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.starts + 1):
            marks = start(args.config, Path(folder), f"run{i}")
            parts = [after - before for before, after in zip([0, *marks[:-1]], marks, strict=True)]
            cells = " | ".join(f"{seconds:.1f} s" for seconds in (*parts, marks[-1]))
            print(f"| {'programs kept' if i else 'nothing kept'} | {cells} |", flush=True)


def start(config, folder, name):
    """Seconds from the start to the end of each part."""
    command = [sys.executable, "-u", "-m", "ant_jax.main", f"--config={config}"]
    command += [f"--workdir={folder / name}", "--config.num_steps=1", "--config.log_every=1"]
    command += ["--config.sample.every=0", "--config.tensorboard=False"]
    environment = {key: value for key, value in os.environ.items() if key != _JAX_CACHE}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    marks, left = [], list(PARTS.values())
    for line in process.stderr:
        if left and line.startswith(left[0]):
            marks.append(time.perf_counter() - begin)
            left.pop(0)
    if process.wait() or left:
        sys.exit(f"{' '.join(command)} failed")
    return marks


if __name__ == "__main__":
    main()

"""Seconds from the command to the first training step: ``python -m benchmarks.first_step``.

Starts ``python -m ant_jax.main`` like a user, in a new workdir: first with an empty compilation
cache, then with the programs that the previous start cached. The log lines of the program and of
JAX separate the parts; for a cached program, "compiled" is the time to load it. The first state and
the step compile at the same time, so the sum of the parts exceeds the total. The last column is
seconds of CPU, which depend less on other work on the machine. Needs Linux.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_JAX_CACHE = "JAX_COMPILATION_CACHE_DIR"
_IMPORTED, _DATA_OPENED, _FIRST_STEP = "train in ", "compiling the step", "step "
# JAX's log lines for the first state ("make") and the step ("_fun" under pmap on many devices).
_MADE = re.compile(r"Finished (tracing|jaxpr|XLA) .*\b(make|step|_fun)\b.* in ([\d.]+) sec")


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument(
        "--starts", type=int, default=3, help="number of starts with cached programs"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.starts + 1):
            parts = start(args.config, Path(folder), f"run{i}")
            if i == 0:
                print("| start | " + " | ".join(parts) + " |")
                print("| --- |" + " --- |" * len(parts))
            cells = " | ".join(f"{seconds:.1f} s" for seconds in parts.values())
            print(f"| {'cached programs' if i else 'empty cache'} | {cells} |", flush=True)


def start(config: str, folder: Path, name: str) -> dict[str, float]:
    """Seconds of each part of a start, in the workdir ``folder / name``."""
    command = [sys.executable, "-u", "-m", "ant_jax.main", f"--config={config}"]
    command += [f"--workdir={folder / name}", "--config.num_steps=1", "--config.log_every=1"]
    command += ["--config.sample.every=0"]
    environment = {key: value for key, value in os.environ.items() if key != _JAX_CACHE}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_LOG_COMPILES": "1"}
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    marks, cpu = {}, 0.0
    made = dict.fromkeys(
        ["first state traced", "first state compiled", "step traced", "step compiled"], 0.0
    )
    assert process.stderr is not None  # it is a pipe
    for line in process.stderr:
        for mark in (_IMPORTED, _DATA_OPENED, _FIRST_STEP):
            if line.startswith(mark) and mark not in marks:
                marks[mark] = time.perf_counter() - begin
                cpu = _cpu_seconds(process.pid)
        if match := _MADE.match(line):
            stage, program, seconds = match.groups()
            what = "first state" if program == "make" else "step"
            made[f"{what} {'compiled' if stage == 'XLA' else 'traced'}"] += float(seconds)
    if process.wait() or len(marks) < 3 or not all(made.values()):
        sys.exit(f"{' '.join(command)} failed")
    return {
        "imports": marks[_IMPORTED],
        "data": marks[_DATA_OPENED] - marks[_IMPORTED],
        **made,
        "total": marks[_FIRST_STEP],
        "CPU": cpu,
    }


def _cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()

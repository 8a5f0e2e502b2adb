"""One HTML file for one run, or for many side by side."""

from ant_jax.runtime import extras

if _error := extras.missing("training"):
    raise _error

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from absl import logging

from ant_jax.config import ConfigError
from ant_jax.report import page, runs, summary
from ant_jax.runtime.files import user_path, write_bytes


def report(workdir: str | Path) -> Path:
    """Writes ``report.html`` into the workdir of a run; see `write`."""
    path = write([workdir], user_path(workdir) / "report.html")
    logging.info("report: %s", path)
    return path


def write(workdirs: Sequence[str | Path], path: str | Path) -> Path:
    """Writes one HTML file that shows runs side by side.

    The file needs no other file and no network. It has the settings that differ, the curves of
    losses, weights and cosines, the measurements, and the grids of samples. Runs that still train
    are shown up to their last logged step. Long curves are thinned to means, and pictures become
    smaller, so that the file has less than 8 MB.

    Args:
      workdirs: of the runs. Folders without a run are left out, with a warning.
      path: of the HTML file.

    Returns:
      The path.

    Raises:
      FileNotFoundError: if a folder does not exist, or none has a run.
      ConfigError: if the files of all runs are damaged.
      MissingExtraError: if plotly is not installed.
    """
    if error := extras.missing("report"):
        raise error
    from plotly.offline import get_plotlyjs

    path = user_path(path)
    found = _found([user_path(workdir) for workdir in workdirs])
    content = summary.summarize(found) | {"made": f"{datetime.now():%Y-%m-%d %H:%M}"}
    write_bytes(path, page.html(content, get_plotlyjs()).encode())
    return path


def _found(workdirs):
    found, problems = [], []
    for workdir in dict.fromkeys(workdirs):
        if not workdir.is_dir():
            raise FileNotFoundError(f"{workdir} is not a folder")
        try:
            run = runs.read(workdir)
        except ConfigError as error:
            run, problem = None, error
        else:
            problem = FileNotFoundError(f"no run in {workdir}")
        if run is None:
            problems.append(problem)
        else:
            found.append(run)
    if not found:
        raise problems[0]
    for problem in problems:
        logging.warning("left out: %s", problem)
    return found

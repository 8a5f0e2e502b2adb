"""Tables, pictures and what runs have logged."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ant_jax.runtime import logs
from ant_jax.runtime.files import write_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def mean_and_deviation(values: Iterable[float], digits: int) -> str:
    """``mean +- standard deviation`` over seeds; the mean alone of one value."""
    values = np.array(list(values), float)
    text = f"{values.mean():.{digits}f}"
    return text if len(values) == 1 else f"{text} +- {values.std(ddof=1):.{digits}f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table that also reads well as it stands."""
    lines = [columns, ["---"] * len(columns), *rows]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(columns))]
    text = (
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return " |\n".join(text) + " |\n"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes one line a dict, the columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, stream.getvalue().encode())


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure, whole or not at all, and closes it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    write_bytes(path, stream.getvalue())


def curves(workdir: Path) -> dict[str, np.ndarray]:
    """The metrics that a run logged, as arrays by name with the steps on the first axis.

    Empty for a run that ended before its first line.
    """
    rows = logs.read(workdir / "metrics.jsonl")
    return {
        name: np.array([row[name] for row in rows], float) for name in (rows[0] if rows else ())
    }

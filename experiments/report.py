"""Tables, pictures and the logged metrics of runs."""

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from ant_jax.runtime import logs
from ant_jax.runtime.files import write_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def mean_and_deviation(values: Iterable[float], digits: int) -> str:
    """``mean +- standard deviation`` over seeds; only the mean if there is one value."""
    values = np.array(list(values), float)
    text = f"{values.mean():.{digits}f}"
    return text if len(values) == 1 else f"{text} +- {values.std(ddof=1):.{digits}f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns, readable as plain text."""
    lines = [columns, ["---"] * len(columns), *rows]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(columns))]
    text = (
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return " |\n".join(text) + " |\n"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes one line per dict; the columns are in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, stream.getvalue().encode())


def save_figure(figure: Any, path: Path, palette: bool = False) -> None:
    """Writes a figure atomically and closes it.

    Args:
      figure: of Matplotlib.
      path: of the PNG.
      palette: whether 256 colours are enough, as for curves and bands: the file is a quarter as
        large.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    if palette:
        # Dithering would put dots into the bands.
        image = Image.open(stream).convert("RGB").quantize(dither=Image.Dither.NONE)
        stream = io.BytesIO()
        image.save(stream, "png", optimize=True)
    write_bytes(path, stream.getvalue())


def curves(workdir: Path) -> dict[str, np.ndarray]:
    """The logged metrics of a run, as arrays by name; the first axis is the logged steps.

    Empty if the run ended before its first logged line.
    """
    return logs.columns(workdir / "metrics.jsonl")


def interval_ends(boundaries: np.ndarray) -> list[tuple[int, int] | tuple[float, float]]:
    """The first and the last noise level of each interval, for people.

    Args:
      boundaries: (k + 1,) of the intervals. Those of a continuous process share their ends.
    """
    if boundaries.dtype.kind == "f":
        ends = [round(float(each), 3) for each in boundaries]
        return list(itertools.pairwise(ends))
    return [(int(low), int(high) - 1) for low, high in itertools.pairwise(boundaries)]

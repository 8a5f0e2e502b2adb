"""Writes docs/metrics.md, the table of all figures of an evaluation, from docstrings.

python docs/metrics.py
"""

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ant_jax import evaluate, evaluation, settings
from ant_jax.evaluation import features, metrics

PATH = Path(__file__).with_suffix(".md")

HEAD = """\
# All figures

`--mode evaluate` prints these figures, `evaluation/STEP.json` has them, and
`config.evaluation.every` measures them during training. A figure is absent if the features, the
reference or the number of images do not allow it. "Real images" are those of the reference: the
training images, unless `config.evaluation.reference` names a file. "Held-out images" are those of
`config.evaluation.split`. `python docs/metrics.py` writes this page.

Compare only figures of equally many samples.
"""


class Figure(NamedTuple):
    """A row of the table: what a docstring says of a figure, behind ``Figures:``.

    Attributes:
      meaning: what it measures.
      unit: its unit.
      range: the values that it can have.
      best: which value is that of a good model; "" if it says nothing about that.
    """

    meaning: str
    unit: str
    range: str
    best: str


def figures(function: Callable) -> dict[str, Figure]:
    """Reads the figures of a docstring.

    Raises:
      ValueError: naming the figure of which a part is missing.
    """
    text = inspect.getdoc(function) or ""
    found = {}
    for section in re.findall(r"^Figures:\n((?:  .*\n?|\n)*)", text, re.M):
        for entry in re.split(r"\n(?=\S)", textwrap.dedent(section).strip()):
            name, _, words = entry.partition(":")
            parts = [part.strip() for part in " ".join(words.split()).split("|")]
            if len(parts) != len(Figure._fields) or not all(parts[:-1]):
                raise ValueError(f"{function.__name__}: {name} needs {' | '.join(Figure._fields)}")
            found[name] = Figure(*parts)
    return found


def all_figures() -> dict[str, Figure]:
    """The figures of all metrics, and those that every evaluation has."""
    found = {}
    for name in settings.names_in(metrics, evaluation.Metric):
        found |= figures(settings.resolve(metrics, name, evaluation.Metric))
    return found | figures(evaluation.measure) | figures(evaluate.evaluate)


def page() -> str:
    """The whole page."""
    floors, other_names = [], {}
    for name in settings.names_in(metrics, evaluation.Metric):
        floors += settings.resolve(metrics, name, evaluation.Metric)().floors
    for name in settings.names_in(features, evaluation.Extractor):
        extractor = settings.resolve(features, name, evaluation.Extractor)
        given = {"training": None} if "training" in inspect.signature(extractor).parameters else {}
        for own, other in extractor(**given).figure_names.items():
            other_names[own] = f"; `{other}` with `{name}` features"
    real = " and ".join(f"`real_{name}`" for name in floors)
    lines = [
        HEAD,
        f"{real} are the same figures of\nthe held-out images: what a perfect generator of as many "
        "samples has.",
        "",
        "| figure | meaning | unit | range | best |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, figure in all_figures().items():
        lines.append("| " + " | ".join((f"`{name}`{other_names.get(name, '')}", *figure)) + " |")
    return "\n".join(lines).replace("``", "`") + "\n"


if __name__ == "__main__":
    PATH.write_text(page())

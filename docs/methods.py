"""Writes docs/methods.md, the table of all multi-task methods, from their docstrings.

python docs/methods.py
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ant_jax import mtl, settings

PATH = Path(__file__).with_suffix(".md")

HEAD = """\
# All methods

`ant_jax.mtl.NAME(k, ...)` is a weighting of k tasks, and `config.method.name = "NAME"` trains with
it. A weighting chooses the weights $w$ from the losses $L$ and the Gram matrix $G = J J^T$ of their
gradients, where row i of the Jacobian $J$ is $g_i$; the update is $J^T w$.
[settings.md](settings.md) has the settings. `python docs/methods.py` writes this page.

A method that does not need the Gram matrix costs one backward pass. With the Gram matrix the cost
is about the same if each example belongs to one task, as in diffusion. If all tasks share all
examples, it is k pullbacks of one forward pass, or one through the trunk
(`mtl.backward_at_features`).

Three systems do not fit this form and are functions of their own: `mtl.slgrad` (SLGrad) weighs each
example of each task, `mtl.rep_mtl` (Rep-MTL) is a loss on the saliencies of shared features, and
`mtl.lookahead_weights` is HydaLearn by real steps.
"""

AGGREGATORS = """
## Aggregators

These methods need more than the Gram matrix. `mtl.NAME(k, ...)` stands where `mtl.combine` stands,
in front of any optimizer. It takes k stacked gradients, or 2 k: those of two halves of each task's
examples. `moco` and `excess_mtl` keep k gradients in their state. A config cannot name them.
"""


class Description(NamedTuple):
    """What the docstring of a method says.

    Attributes:
      title: its name in words.
      formula: TeX.
      use: when to use it, one sentence.
      paper: authors, title, venue.
      example: one line of code.
    """

    title: str
    formula: str
    use: str
    paper: str
    example: str


def description(method: Callable) -> Description:
    """Reads the docstring of a method.

    Raises:
      ValueError: naming the part that the docstring lacks.
    """
    text = inspect.getdoc(method) or ""
    words = " ".join(text.partition("\nArgs:")[0].split())
    patterns = {
        "title": (text, r"\A(.+)"),
        "formula": (words, r":math:`([^`]+)`"),
        "use": (words, r"\b(Use it .+?[^.A-Z]\.)(?= [A-Z]|$)"),
        "paper": (words, r"\(([^()]*\*[^*()]+\*[^()]*)\)"),
        "example": (text, r"(?m)^Example::\n\n +(.+)$"),
    }
    found = {}
    for name, (where, pattern) in patterns.items():
        match = re.search(pattern, where)
        if match is None:
            raise ValueError(f"the docstring of {method.__name__} has no {name}")
        found[name] = match[1]
    return Description(**found)


def page() -> str:
    """The whole page."""
    lines = [
        HEAD,
        "| method | weights | needs | when | paper |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in settings.names_in(mtl, mtl.Weighting):
        method = settings.resolve(mtl, name, mtl.Weighting)
        said = description(method)
        needs = {"losses": "$L$", "gram": "$G$"}
        row = (
            f"`{name}`: {said.title.rstrip('.')}",
            f"${_in_cell(said.formula)}$",
            ", ".join(words for need, words in needs.items() if need in method(3).needs),
            said.use.removeprefix("Use it ").rstrip("."),
            said.paper,
        )
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        AGGREGATORS,
        "| method | formula | gradients | when | paper |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in mtl.aggregators.__all__:
        method = getattr(mtl, name)
        said = description(method)
        halves = "leaves (2 k, *param_shape)" in inspect.getdoc(method)
        row = (
            f"`{name}`: {said.title.rstrip('.')}",
            f"${_in_cell(said.formula)}$",
            "2 k" if halves else "k",
            said.use.removeprefix("Use it ").rstrip("."),
            said.paper,
        )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _in_cell(formula):
    """A bar would end the cell."""
    return formula.replace(r"\|", r"\Vert ").replace("|", r"\vert ")


if __name__ == "__main__":
    PATH.write_text(page())

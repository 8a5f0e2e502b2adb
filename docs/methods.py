"""Writes docs/methods.md, the table of all multi-task methods, from their docstrings.

python docs/methods.py
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ant_jax import mtl, settings
from ant_jax.mtl.aggregators.halves import OnHalves

PATH = Path(__file__).with_suffix(".md")

HEAD = """\
# All methods

`ant_jax.mtl.NAME(k, ...)` is a weighting of k tasks, and `config.method.name = "NAME"` trains with
it. A weighting chooses the weights $w$ from the losses $L$ and the Gram matrix $G = J J^T$ of their
gradients, where row i of the Jacobian $J$ is $g_i$; the update is $J^T w$.
[settings.md](settings.md) has the settings and their ranges.
`help(ant_jax.mtl.NAME)` explains the method and the other symbols of its formula.
`python docs/methods.py` writes this page.

A method that does not need the Gram matrix costs one backward pass. With the Gram matrix the cost
is about the same if each example belongs to one task, as in diffusion. If all tasks share all
examples, it is k pullbacks of one forward pass, or one through the trunk
(`mtl.backward_at_features`).

Three systems do not fit this form. They are functions for your own loop; a config cannot name
them, and `help` shows an example of each:

- `mtl.slgrad` (SLGrad) weighs each example of each task. Use it if some examples of the auxiliary
  tasks are harmful. It needs held-out examples of a main task.
- `mtl.rep_mtl` (Rep-MTL) adds two losses on the gradients at shared features. Use it if all tasks
  share all examples.
- `mtl.lookahead_weights` (HydaLearn as in the paper) tries a step along the gradient of each task
  and measures the main loss, which may be any metric.

## Which method?

- **As a baseline**: `linear`.
- **Losses of different sizes**: `uncertainty`, `imtl_l` or `geometric_mean` need one backward pass.
  `nash`, `imtl_g` and `db_mtl` need the Gram matrix, and also handle gradients of different
  lengths.
- **Conflicting gradients**: `nash`, `cagrad`, `upgrad` or `mgda`; `pcgrad` if the gradients have
  similar lengths.
- **A main task with auxiliary tasks**: `gcosim` and `hydalearn` take the index of the main task,
  `lookahead_weights` its loss, and `slgrad` its gradient on held-out examples. With helpful and
  harmful auxiliary tasks together, some methods that know no main task were better:
  [`famo`, `nash` and `uncertainty`](../experiments/RESULTS.md#auxiliary-tasks).
- **A fixed preference**: `linear(3, weights=(0.5, 0.3, 0.2))` weighs the losses. `cosmos` and `pbi`
  ask for losses in given proportions.
- **Losses that differ inside a task**: `mtl.level_uncertainty` around any method, or
  `config.method.level_uncertainty = 0.01`, learns a weight of each noise level, as EDM2 does. With
  `linear` it is EDM2's loss, and `uncertainty` is its form that is constant in each task.
- **Noisy gradients**: `modo`, `sdmgrad` or `moco`. **Outliers**: `trimmed_mean` or `krum`.
- **Many devices**: each method works on many devices. A run needs no setting
  ([many_devices.md](many_devices.md)). In your own loop, give `axis_name` to `combine`, `backward`
  or the aggregator. `backward` with `form="vmap"` or `"scan"` then computes on each device the
  gradients of its own tasks alone, and sends no more bytes than training without tasks if the
  number of tasks divides the number of devices. `combine` of k gradients of every device sends
  k + 1 times the bytes of one gradient, where training without tasks sends 2 times.

## Weightings
"""

AGGREGATORS = """
## Aggregators

These methods need more than the Gram matrix. `mtl.NAME(k, ...)` stands where `mtl.combine` stands,
in front of any optimizer. It takes k stacked gradients, or 2 k: those of two halves of each task's
examples. `moco` and `excess_mtl` keep k gradients in their state. A config cannot name them.

They have no argument `shared`. If each task has a head, let the aggregator see the trunk alone, and
add the gradients of the heads:

```python
import jax, jax.numpy as jnp
from ant_jax import mtl

params = {"trunk": jnp.zeros(3), "heads": jnp.zeros(2)}
losses = jnp.array([1.0, 2.0])
stacked = {"trunk": jnp.eye(2, 3), "heads": jnp.eye(2)}  # the gradients of both tasks
aggregator = mtl.moco(2)
state = aggregator.init(params["trunk"])
trunk, state = aggregator.update(stacked["trunk"], state, losses=losses)
updates = {"trunk": trunk, "heads": jax.tree.map(lambda g: g.sum(0), stacked["heads"])}
```
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
    on_halves = settings.names_in(mtl.aggregators, OnHalves)
    for name in mtl.aggregators.__all__:
        method = getattr(mtl, name)
        said = description(method)
        row = (
            f"`{name}`: {said.title.rstrip('.')}",
            f"${_in_cell(said.formula)}$",
            "2 k" if name in on_halves else "k",
            said.use.removeprefix("Use it ").rstrip("."),
            said.paper,
        )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _in_cell(formula):
    """A bar would end the cell, and a formula must not end with a space."""
    return formula.replace(r"\|", r"\Vert ").replace("|", r"\vert ").strip()


if __name__ == "__main__":
    PATH.write_text(page())

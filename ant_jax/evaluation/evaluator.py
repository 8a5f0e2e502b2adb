"""Joins a feature extractor and metrics: from samples to figures."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ant_jax.evaluation.features import Extractor, Network
from ant_jax.evaluation.metrics import Metric
from ant_jax.evaluation.summary import Batch, Reference, summarise


class Evaluator(NamedTuple):
    """A loaded extractor, and metrics that need no other outputs than its own.

    Attributes:
      extractor: The extractor.
      network: The extractor's network, loaded.
      metrics: The metrics.
    """

    extractor: Extractor
    network: Network
    metrics: tuple[Metric, ...]

    @property
    def moments(self) -> frozenset[str]:
        """Names of outputs whose mean and covariance are needed."""
        return frozenset().union(*(metric.moments for metric in self.metrics))

    @property
    def samples(self) -> frozenset[str]:
        """Names of outputs that are needed for each sample."""
        return frozenset().union(*(metric.samples for metric in self.metrics))

    @property
    def real(self) -> frozenset[str]:
        """Names of outputs that are needed for each real image."""
        return frozenset().union(*(metric.real for metric in self.metrics))


def build_evaluator(extractor: Extractor, metrics: Sequence[Metric]) -> Evaluator:
    """Loads an extractor, and leaves out the metrics that need outputs it does not have.

    Raises:
      ValueError: If the weights are damaged, or are of another network.
      OSError: If the weights cannot be opened.
    """
    given = extractor.shapes.keys()
    able = tuple(each for each in metrics if given >= each.moments | each.samples | each.real)
    return Evaluator(extractor, _checked(extractor.load(), extractor.shapes), able)


def _checked(network, shapes):
    """A network that raises a ValueError if its outputs do not have these shapes."""

    def outputs(batches):
        for found in network.outputs(batches):
            for name, shape in shapes.items():
                there = found[name].shape[1:] if name in found else "missing"
                if there != shape:
                    raise ValueError(
                        f"the extractor's shapes say that {name!r} of an image is {shape}, but its "
                        f"output is {there}"
                    )
            yield found

    return network._replace(outputs=outputs)


def measure(batches: Iterable[Batch], evaluator: Evaluator, reference: Reference) -> dict[str, Any]:
    """Evaluates samples, one batch of images in memory at a time.

    Every figure depends on the number of samples. Compare only equal numbers, and use 50 000
    samples to compare with published figures.

    Args:
      batches: Pairs of uint8 images (n, height, width, channels) and the labels (n,) that they were
        generated for, or None. Samples should not be sorted by class, because some metrics split
        them in order.
      evaluator: The extractor and the metrics.
      reference: The real images.

    Returns:
      The figures of all metrics for which the reference has what they need; ``num_samples``; and
      ``reference``, the name of the reference. If there are held-out images, ``real_NAME`` is the
      same figure of those images, and ``real_num_samples`` is their number.

    Figures:
      num_samples: the samples | number | 2 and above | equal, to compare runs
      real_num_samples: the held-out images | number | 2 and above | equal, to compare runs
      reference: the real images: the name and split of the data, or a file | none | a name | equal,
        to compare runs

    Raises:
      ValueError: If there are fewer than two samples, or a metric can't measure them.
    """
    real, held_out = reference.summary, reference.held_out
    evaluator = evaluator._replace(
        metrics=tuple(
            each
            for each in evaluator.metrics
            if real.gaussians.keys() >= each.moments and real.kept.keys() >= each.real
        )
    )
    samples = summarise(batches, evaluator.network, evaluator.moments, evaluator.samples)
    figures = {}
    for metric in evaluator.metrics:
        figures |= _plain(metric.measure(samples, reference))
    figures["num_samples"] = samples.count
    if held_out is not None:
        for metric in evaluator.metrics:
            if metric.floors:
                floors = _plain(metric.measure(held_out, reference))
                figures |= {f"real_{name}": floors[name] for name in sorted(metric.floors)}
        figures["real_num_samples"] = held_out.count
    return _named(figures, evaluator.extractor) | {"reference": reference.name}


def _plain(figures):
    """Figures with numbers of Python, which JSON can hold."""
    return {
        name: value if isinstance(value, str) or np.ndim(value) else float(value)
        for name, value in figures.items()
    }


def best_by(evaluator: Evaluator) -> dict[str, float]:
    """The figures by which models are ranked, in the order of the metrics.

    Returns:
      For each figure -1 if its lowest value is the best, or 1 if its highest is.
    """
    signs = {}
    for metric in evaluator.metrics:
        signs |= {metric.lowest_is_best: -1.0, metric.highest_is_best: 1.0}
    return _named({name: sign for name, sign in signs.items() if name}, evaluator.extractor)


def table(figures: dict[str, Any]) -> str:
    """The figures that papers report, in one line under their names."""
    columns = {
        "FID": ("fid", ".3f"),
        "sFID": ("sfid", ".3f"),
        "IS": ("inception_score", ".2f"),
        "precision": ("precision", ".3f"),
        "recall": ("recall", ".3f"),
        "samples": ("num_samples", "d"),
        "reference": ("reference", "s"),
    }
    cells = {
        title: format(figures[name], form) if name in figures else "-"
        for title, (name, form) in columns.items()
    }
    widths = {title: max(len(title), len(cell)) for title, cell in cells.items()}
    lines = (
        "  ".join(each[title].rjust(width) for title, width in widths.items())
        for each in ({title: title for title in cells}, cells)
    )
    return "\n".join(lines)


def _named(figures: dict[str, Any], extractor: Extractor) -> dict[str, Any]:
    names = dict(extractor.figure_names)
    names |= {f"real_{old}": f"real_{new}" for old, new in extractor.figure_names.items()}
    return {names.get(name, name): value for name, value in figures.items()}

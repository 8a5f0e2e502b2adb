"""Whether a classifier predicts the labels that samples were generated for."""

import numpy as np

from ant_jax.evaluation.metrics import Metric


def label_accuracy() -> Metric:
    """``label_accuracy``, and ``classifier_test_accuracy`` to compare it with.

    The first is the share of labelled samples whose label the extractor predicts. It is absent if
    no sample has a label. The second is the same share of the held-out real images.

    Figures:
      label_accuracy: labelled samples whose label a classifier predicts | share | 0 to 1 | high
      classifier_test_accuracy: held-out images whose label the same classifier predicts | share | 0
        to 1 | says nothing about the model
    """

    def measure(samples, reference):
        figures = {"label_accuracy": _accuracy(samples)}
        if reference.held_out is not None:
            figures["classifier_test_accuracy"] = _accuracy(reference.held_out)
        return {name: value for name, value in figures.items() if value is not None}

    return Metric(measure, samples=frozenset({"labels"}), highest_is_best="label_accuracy")


def _accuracy(summary):
    found = summary.kept["labels"]
    wanted = summary.labels[: len(found)]
    labelled = wanted >= 0
    return float(np.mean((found == wanted)[labelled])) if labelled.any() else None

"""The inception score."""

import numpy as np

from ant_jax.evaluation.metrics import Metric


def inception_score() -> Metric:
    """``inception_score`` of the logits, in splits of 5000: see `inception_score_of`.

    Sample i of `sampling.sample_batches` is of class i mod classes, so the splits are balanced.

    Figures:
      inception_score: how confident and how diverse a classifier's predictions are for the samples
        | none | 1 to the number of classes | high
    """

    def measure(samples, reference):
        return {"inception_score": inception_score_of(samples.kept["logits"])}

    return Metric(measure, samples=frozenset({"logits"}), highest_is_best="inception_score")


def inception_score_of(logits: np.ndarray, split_size: int = 5000) -> float:
    """Returns the inception score: how confident and how diverse a classifier's predictions are.

    exp(mean over x of KL(p(y|x) | p(y))), p(y) being the mean of p(y|x) over a split (Salimans et
    al., *Improved Techniques for Training GANs*, 2016, section 4); the score is the mean over
    splits. Dhariwal & Nichol, *Diffusion Models Beat GANs*, 2021, and papers that compare with them
    use 50 000 samples in splits of 5000, in order, with 1008 logits: Inception's pool features
    times the weights of its last layer, without the bias.

    Log-probabilities are computed from logits, not from probabilities, so none underflows. The
    memory is that of a few splits in float64.

    Args:
      logits: (n, classes) unnormalised log-probabilities. They are split in order, so samples that
        are sorted by class should be shuffled. A remainder is a smaller split of equal weight.
      split_size: Number of samples of a split. Smaller splits lower the score.

    Returns:
      The score, between 1 and the number of classes.

    Raises:
      ValueError: If the logits are not a non-empty matrix of finite numbers, or the split size is
        not positive.
    """
    if logits.ndim != 2 or logits.size == 0:
        raise ValueError(f"logits must be a non-empty (n, classes) array, got {logits.shape}")
    if split_size < 1:
        raise ValueError(f"split_size must be positive, got {split_size}")
    parts = (logits[i : i + split_size] for i in range(0, len(logits), split_size))
    return float(np.mean([_score(part.astype(np.float64)) for part in parts]))


def _score(logits: np.ndarray) -> float:
    # Imported here, because it is slow and training does not need it.
    from scipy.special import logsumexp

    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite")
    logs = logits - logsumexp(logits, axis=1, keepdims=True)
    log_marginal = logsumexp(logs, axis=0) - np.log(len(logs))
    return np.exp(np.sum(np.exp(logs) * (logs - log_marginal), axis=1).mean())

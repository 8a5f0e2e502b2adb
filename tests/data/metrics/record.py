"""Records the figures of public programs for `test_public_figures.py`.

Usage: python record.py FOLDER, with the versions recorded in the file; FOLDER receives
figures.json.
"""

import json
import sys
from pathlib import Path

import numpy as np

NEIGHBOURS = 3
SPLIT_SIZE = 50


def features():
    """Real (200, 24) and fake (150, 24) features whose clouds overlap in part, (150, 30) logits."""
    random = np.random.RandomState(0)
    mixing = random.standard_normal((24, 24)) / 5
    real = random.standard_normal((200, 24)) @ mixing
    fake = 0.9 * random.standard_normal((150, 24)) @ mixing + 0.35
    return np.float32(real), np.float32(fake), np.float32(3 * random.standard_normal((150, 30)))


def main(folder):
    import prdc
    import pytorch_fid.fid_score
    import scipy
    import torch
    import torch_fidelity
    from torch_fidelity.metric_isc import isc_features_to_metric

    real, fake, logits = features()
    shares = prdc.compute_prdc(real, fake, NEIGHBOURS)
    statistics = [(x.mean(0, dtype=float), np.cov(x, rowvar=False)) for x in (fake, real)]
    distance = pytorch_fid.fid_score.calculate_frechet_distance(*statistics[0], *statistics[1])
    score = isc_features_to_metric(torch.from_numpy(logits), len(logits) // SPLIT_SIZE, False)
    figures = {
        "versions": f"prdc 0.2, pytorch-fid 0.3.0, torch-fidelity {torch_fidelity.__version__}, "
        f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}",
        "precision": shares["precision"],
        "recall": shares["recall"],
        "frechet_distance": float(distance),
        "inception_score": score["inception_score_mean"],
    }
    (Path(folder) / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

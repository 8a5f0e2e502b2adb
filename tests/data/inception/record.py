"""Records features of FID's InceptionV3 with random weights for `test_inception.py`.

Usage: python record.py FOLDER, with the versions recorded in the file; FOLDER receives
inception.npz. Weights are not stored: `weight` makes them from their names. The outputs are those
of torch-fidelity's extractor, from uint8 pixels on; pytorch-fid's network is checked to agree.
"""

import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np


def weight(name, shape):
    """A random weight that anybody can make again; NumPy's old generator never changes."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    kind = name.rsplit(".", 1)[1]
    if kind == "running_var":
        return np.float32(random.uniform(0.5, 1.5, shape))
    values = random.standard_normal(shape)
    if len(shape) > 1:
        # As large as the ReLU takes away (He et al. 2015).
        return np.float32(values * np.sqrt(2 / np.prod(shape[1:])))
    return np.float32(values / 8 + (kind == "weight"))


def grey(height, width):
    """A random image."""
    return np.uint8(np.random.RandomState(height + width).randint(0, 256, (height, width)))


def main(folder):
    import pytorch_fid.inception as pytorch_fid
    import torch
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    # The published weights are neither fetched nor needed.
    pytorch_fid.load_state_dict_from_url = lambda url, progress: {}
    load = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda self, state: None
    first = pytorch_fid.fid_inception_v3()
    torch.nn.Module.load_state_dict = load

    shapes = {
        name: tuple(value.shape)
        for name, value in first.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    state = {name: torch.from_numpy(weight(name, shape)) for name, shape in shapes.items()}
    first.load_state_dict(state, strict=False)
    first.eval()
    names = ["2048", "logits_unbiased"]
    with tempfile.NamedTemporaryFile() as file:
        torch.save(first.state_dict(), file.name)
        second = FeatureExtractorInceptionV3("inception", names, file.name)

    random = np.random.RandomState(0)
    images = random.randint(0, 256, (1, 5, 7, 3)).repeat(7, 1).repeat(9, 2)
    images = np.uint8(np.clip(images + random.randint(-20, 21, images.shape), 0, 255))
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2)

    seen = {}
    second.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, y: seen.update(second=y))
    first.Mixed_6d.branch1x1.register_forward_hook(lambda m, x, y: seen.update(first=y))
    first.avgpool.register_forward_hook(lambda m, x, y: seen.update(pool=y))
    resized = interpolate_bilinear_2d_like_tensorflow1x(
        nchw.float(), size=(299, 299), align_corners=False
    )
    with torch.no_grad():
        pool, logits = second(nchw)
        first((resized - 128) / 128)
    torch.testing.assert_close(seen["pool"][:, :, 0, 0], pool, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["first"], seen["second"], rtol=1e-5, atol=1e-5)
    spatial = seen["second"][:, :7].permute(0, 2, 3, 1).flatten(1)
    print("pool", pool.mean(), pool.std(), "spatial", spatial.mean(), "logits", logits.std())

    sizes = [(1, 3), (8, 8), (299, 299), (37, 512)]
    # A few rows and columns say it all.
    places = np.array([0, 1, 2, 71, 150, 211, 297, 298])
    some = [
        interpolate_bilinear_2d_like_tensorflow1x(
            torch.from_numpy(grey(*size))[None, None].float(), (299, 299), align_corners=False
        ).numpy()[0, 0][np.ix_(places, places)]
        for size in sizes
    ]
    np.savez_compressed(
        Path(folder) / "inception.npz",
        versions=f"torch {torch.__version__}, torch-fidelity {torch_fidelity.__version__}, "
        "pytorch-fid 0.3.0",
        names=list(shapes),
        shapes=[" ".join(map(str, shape)) for shape in shapes.values()],
        images=images,
        pool=pool.numpy(),
        spatial=spatial.numpy(),
        logits=logits.numpy(),
        sizes=sizes,
        places=places,
        resized=np.stack(some),
    )


if __name__ == "__main__":
    main(sys.argv[1])

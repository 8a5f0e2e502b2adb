"""Records outputs of tiny networks of the code of SiT and of DTR for `tests/models`.

Usage: python record_code.py SIT DTR, with checkouts of willisma/SiT and byeongjun-park/DTR, and
with torch 2.13.0 and timm as recorded in the files. The files sit.npz and dtr.npz are written
beside this one. Weights are not stored: `weight` of record.py makes them from their names.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
from record import weight

SETTINGS = dict(
    input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=5
)
# Made by the code, not trained.
CONSTANTS = ("pos_embed", "routing._unit_mapping")


def record(path, model, t):
    import timm
    import torch

    state = model.state_dict()
    constant = {name: value.numpy() for name, value in state.items() if name.endswith(CONSTANTS)}
    shapes = {name: tuple(state[name].shape) for name in state if name not in constant}
    weights = {name: torch.from_numpy(weight(name, shape)) for name, shape in shapes.items()}
    model.load_state_dict(state | weights)
    model.eval()
    x = np.float32(np.random.RandomState(0).standard_normal((3, 3, 8, 8)))
    y = np.array([0, 4, 5])
    with torch.no_grad():
        output = model(*map(torch.from_numpy, (x, t, y))).numpy()
    print(f"{path.name}: output {output.std():.3f}")
    np.savez_compressed(
        path,
        versions=f"torch {torch.__version__}, timm {timm.__version__}",
        names=list(shapes),
        shapes=[" ".join(map(str, shape)) for shape in shapes.values()],
        **{f"constant {name}": value for name, value in constant.items()},
        x=x,
        t=t,
        y=y,
        output=output,
    )


def main(sit, dtr):
    folder = Path(__file__).parent
    sys.path.insert(0, sit)
    network = importlib.import_module("models").SiT(**SETTINGS)
    record(folder / "sit.npz", network, np.float32([0, 0.3, 1]))
    del sys.modules["models"]
    sys.path[0] = dtr
    network = importlib.import_module("models.DiT.models").DiT(
        **SETTINGS,
        router=importlib.import_module("models.taskrouting").TaskRouter,
        sharing_ratio=0.8,
        init_method="DTR",
    )
    record(folder / "dtr.npz", network, np.array([0, 500, 999]))


if __name__ == "__main__":
    main(*sys.argv[1:])

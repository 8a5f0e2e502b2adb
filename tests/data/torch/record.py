"""Writes the checkpoints beside it, with torch 2.13.0 and NumPy 2.4.6 for Python 3.11.

To record them anew: pip install torch==2.13.0, then python tests/data/torch/record.py
"""

import argparse
import sys
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]


def plain():
    base = torch.arange(24, dtype=torch.float32)
    return {
        "dtypes": {
            name: (torch.arange(6) - 2).to(getattr(torch, name)) for name in [*DTYPES, "bool"]
        },
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "shared": [base, base[6:18].reshape(3, 4).T, base.reshape(2, 3, 4)[:, 1, ::2]],
        "expanded": torch.tensor([7], dtype=torch.int16).expand(2, 3),
        "parameter": torch.nn.Parameter(torch.arange(4.0)),
        "storage": torch.arange(3).untyped_storage(),
        "size": torch.Size([2, 3]),
        "device": [torch.device("cpu"), torch.device("cuda", 1)],
        "dtype": torch.float32,
        "nested": [(1, -2.5, "ä"), {"none": None, 3: True}, (), [], b"\x00\xff", b"", 2**70],
        "set": {"a", 1},
        "tuple_key": {(1, "a"): 2},
    }


def lightning():
    """A file as of PyTorch Lightning, with a class as a key, and of DiT's training script."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    sys.modules["pytorch_lightning"] = types.ModuleType("pytorch_lightning")
    sys.modules["pytorch_lightning.callbacks"] = types.ModuleType("pytorch_lightning.callbacks")
    sys.modules[module.__name__] = module
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        network[0].weight.copy_(torch.arange(6.0).reshape(2, 3))
        network[0].bias.copy_(torch.tensor([0.5, -0.5]))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    network.load_state_dict(network.state_dict() | {"0.weight": torch.arange(6.0).reshape(2, 3)})
    return {
        "epoch": 3,
        "state_dict": network.state_dict(),
        "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.tensor(0.25)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_lr": [np.float64(1e-4)], "step": np.int64(7)}],
        "args": argparse.Namespace(model="DiT-S/2", inner=argparse.Namespace(lr=1e-4)),
    }


torch.save(plain(), HERE / "zip.pt")
torch.save(plain(), HERE / "zip_protocol5.pt", pickle_protocol=5)
torch.save(plain(), HERE / "legacy.pth", _use_new_zipfile_serialization=False)
torch.save(lightning(), HERE / "lightning.ckpt")
torch.save(torch.nn.Linear(1, 1), HERE / "module.pt")

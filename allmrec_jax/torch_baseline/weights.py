"""Our weights in a PyTorch module."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch

from allmrec_jax.models import params


def load(module: torch.nn.Module, description: Any, tree: Any, **more: np.ndarray) -> torch.nn.Module:
    """`module` with our weights: every name of its state_dict must be there, and no other."""
    tensors = params.to_torch(description, jax.device_get(tree)) | more
    module.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()}, strict=True)
    return module

"""Our weights in a PyTorch module, and back."""

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


def weights_of(module: torch.nn.Module, description: Any) -> Any:
    """The module's parameters as our tree."""
    found = {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
    return params.from_torch(description, found)


def gradients_of(module: torch.nn.Module, description: Any) -> Any:
    """The gradients that `backward` left in the module, as our tree; 0 where there are none."""
    found = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy().copy()
        for name, p in module.named_parameters()
    }
    return params.from_torch(description, found)

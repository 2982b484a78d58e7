"""Carries weights between our parameter trees and PyTorch modules, and compares the two sides."""

from typing import Any

import jax
import numpy as np
import torch

from allmrec_jax.models import params
from allmrec_jax.torch_baseline.weights import load

__all__ = ["assert_trees_close", "gradients_of", "load", "randomised", "weights_of"]


def randomised(key: jax.Array, description: Any, spread: float = 0.1) -> Any:
    """The initial tree with noise on every parameter, so that no bias is 0 and no scale is 1."""
    tree = params.init(key, description)
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    return jax.tree.unflatten(
        structure, [x + spread * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def weights_of(module: torch.nn.Module, description: Any) -> Any:
    """The module's parameters as our tree."""
    return params.from_torch(description, {name: p.detach().numpy() for name, p in module.named_parameters()})


def gradients_of(module: torch.nn.Module, description: Any) -> Any:
    """The gradients that `backward` left in the module, as our tree."""
    return params.from_torch(description, {name: p.grad.numpy() for name, p in module.named_parameters()})


def assert_trees_close(ours: Any, theirs: Any, *, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Leaf by leaf; `atol` is relative to the leaf's largest element, the error says which leaf."""
    ours, theirs = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (ours, theirs))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(
            a, b, rtol=rtol, atol=atol * np.abs(b).max(), err_msg=jax.tree_util.keystr(path, simple=True, separator="/")
        )

"""Frozen large language models as Flax NNX modules, their attention and their loaders."""

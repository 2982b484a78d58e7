"""The models: pure functions over parameter trees, and Flax NNX modules for the pre-trained transformers."""

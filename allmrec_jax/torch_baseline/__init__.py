"""The same model as plain PyTorch: what ours is checked and timed against. The only place that imports torch."""

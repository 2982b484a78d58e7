"""Training: meshes, the resumable loop, Orbax checkpoints and the three stages."""

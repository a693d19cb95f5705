"""Training: data, objectives, optimisers, the loop, checkpoints; on one device or many hosts."""

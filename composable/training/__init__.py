"""Documents, data, objectives, the loop, checkpoints; the same code on a laptop and on a pod."""

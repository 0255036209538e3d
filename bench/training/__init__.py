"""The training loop, checkpoints, and advantages."""

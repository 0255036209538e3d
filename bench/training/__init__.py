"""The one training loop and what it stands on: checkpoints, accounting, advantages, several processes, the log."""

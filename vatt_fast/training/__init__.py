"""Pre-training a VATT: schedule, checkpoints, the loop."""

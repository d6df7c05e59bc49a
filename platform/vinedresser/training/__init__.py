"""Training: the loop, its step, evaluation, checkpoints and device."""

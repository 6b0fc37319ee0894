"""Training: a pure step, two ways to compile it, checkpoints, and the loop around them."""

"""The vocabulary and mathematics of GRPO, and the drivers that run it."""

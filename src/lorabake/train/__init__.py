"""Training: preparing a run, the one loop, its checkpoints, and the state a killed run continues from."""

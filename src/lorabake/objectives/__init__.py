"""What is predicted and how wrong it was: noise, timesteps, targets, losses and weightings, as short functions."""

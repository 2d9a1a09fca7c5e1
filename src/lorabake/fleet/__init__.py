"""Several trainings: a queue of them on this machine."""

"""Optimizers as rows over packages, the flat buffer they step on, and learning-rate schedules."""

"""Stable Diffusion 3 and 3.5 (medium, large and models of their make)."""

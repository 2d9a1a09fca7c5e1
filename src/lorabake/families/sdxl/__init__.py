"""Stable Diffusion XL and models of its make, of any size."""

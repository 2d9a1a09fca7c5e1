"""The pocket model: an embedded small Stable Diffusion, the picture world it was trained on, and a judge of its pictures."""

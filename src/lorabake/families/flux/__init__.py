"""Flux.1 (dev, schnell and models of their make)."""

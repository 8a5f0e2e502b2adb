"""Denoising networks, as Flax Linen modules."""

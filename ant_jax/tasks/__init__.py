"""Denoising tasks: clusters of noise levels, their affinity, negative transfer."""

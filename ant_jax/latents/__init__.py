"""Diffusion in the latents of an autoencoder: the autoencoder, encoding, and latents as data."""

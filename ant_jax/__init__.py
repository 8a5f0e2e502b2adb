"""Multi-task training of diffusion models in JAX: ANT (Go et al., NeurIPS 2023)."""

"""Multi-task training of diffusion models in JAX: ANT (Go et al., NeurIPS 2023)."""

__version__ = "0.1.0"


def __getattr__(name):
    if name == "load_run":
        # JAX takes its time, and not everybody who imports a part of this needs all of it.
        from ant_jax.runtime import extras

        if error := extras.missing("training"):
            raise error
        from ant_jax.workdir.run import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The packages; `setup.cfg` says the rest."""

from setuptools import find_packages, setup

# The configs travel with the package, from where they lie beside it.
setup(
    packages=[*find_packages(include=["ant_jax", "ant_jax.*"]), "ant_jax.configs"],
    package_dir={"ant_jax.configs": "configs"},
)

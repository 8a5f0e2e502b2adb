"""What a docstring shows, and what a compiled program holds."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ant_jax import mtl


def run_example(function, *names):
    """Runs the code block of a docstring, at most ten lines; returns what it gave some names."""
    (block,) = re.findall(r"::\n\n((?:  .*\n|\n)+)", inspect.getdoc(function))
    code = inspect.cleandoc(block)
    assert len([line for line in code.splitlines() if line]) <= 10

    # One program, which compiles faster than its operations one by one.
    @jax.jit
    def run():
        scope = {"jax": jax, "jnp": jnp, "optax": optax, "mtl": mtl}
        exec(code, scope)
        return [scope[name] for name in names]

    return run()


def largest_array(function, *args):
    """Size of the largest array in the compiled program of a function."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f32|pred|s32)\[([\d,]*)\]", text)
    return max(np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes)

"""Schedules of the learning rate after the warm-up that a config can name, one file each.

A schedule is a function of its settings that returns an `optax.Schedule`, ``step -> rate``. If it
takes ``num_steps``, the learning rates depend on the length of the run, which then can't change.
To train on, begin another run with ``config.init_from``.
"""

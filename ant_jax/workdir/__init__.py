"""The folder of a run: its config, its facts, its checkpoints."""

from ant_jax.workdir.record import (
    Step,
    exclusive,
    facts,
    facts_of,
    load_config,
    load_facts,
    names_of,
    recorded,
    restore,
    restore_average,
    restore_params,
    run_id,
    save_config,
    save_facts,
    save_record,
)

__all__ = [
    "Step",
    "exclusive",
    "facts",
    "facts_of",
    "load_config",
    "load_facts",
    "names_of",
    "recorded",
    "restore",
    "restore_average",
    "restore_params",
    "run_id",
    "save_config",
    "save_facts",
    "save_record",
]

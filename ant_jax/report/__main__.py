"""Shows runs side by side in one HTML file: ``python -m ant_jax.report DIR [DIR ...]``."""

import sys

from ant_jax.runtime import extras

if _error := extras.missing("report"):
    sys.exit(f"error: {_error}")

from absl import app, flags, logging

from ant_jax import cli, report
from ant_jax.runtime.logs import quiet_console

_OUT = flags.DEFINE_string("out", "report.html", "The HTML file.")


def main(argv: list[str]) -> None:
    """Writes the report of the workdirs on the command line."""
    if len(argv) < 2:
        cli.refuse("give the workdir of a run, or of several")
    quiet_console()
    with cli.errors_in_one_line():
        logging.info("report: %s", report.write(argv[1:], _OUT.value))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)

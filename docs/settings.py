"""Writes docs/settings.md, the list of all settings, from where they are defined.

python docs/settings.py
"""

import importlib
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from ant_jax import config, settings
from ant_jax.settings import Affects, Setting

PATH = Path(__file__).with_suffix(".md")

HEAD = """\
# All settings

Each setting is `config.NAME` in a config file and `--config.NAME=VALUE` on the command line. A
group with components has a `name` (`evaluation` has `features` instead); its other settings are
those of the component. A name can also be your own, `package.module:attribute`
([adding.md](adding.md)). `python docs/settings.py` writes this page.

"Resume" says whether a run may go on with another value: settings that affect the parameters may
not change. `num_steps` may change if the schedule does not depend on it.
"""


def described(component: Callable) -> dict[str, str]:
    """What a docstring says of each argument or attribute."""
    text = inspect.getdoc(component) or ""
    found = {}
    for section in re.findall(r"^(?:Args|Attributes):\n((?:  .*\n?|\n)*)", text, re.M):
        for entry in re.split(r"\n(?=\S)", textwrap.dedent(section)):
            name, _, words = entry.partition(":")
            found[name.strip()] = " ".join(words.split())
    return found


def summary(component: Callable) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(component) or "").split("\n\n")[0].split())


def table(found: dict[str, Setting], words: dict[str, str]) -> str:
    """The settings of one component or group, a row each."""
    lines = ["| setting | default | allowed | resume | |", "| --- | --- | --- | --- | --- |"]
    for name, setting in found.items():
        default = "" if setting.default is settings.REQUIRED else f"`{setting.default!r}`"
        resume = "" if setting.affects & Affects.PARAMETERS else "yes"
        row = (f"`{name}`", default, setting.check.allowed, resume, words.get(name, ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for group in config.GROUPS:
        title = f"`config.{group.name}`" if group.name else f"{group.common.__name__}: `config`"
        parts.append(f"## {title}")
        if group.common:
            parts.append(summary(group.common))
            common = settings.settings_of(group.common, (), group.affects)
            parts.append(table(common, described(group.common)))
        if not group.folder:
            continue
        module, _, attribute = group.makes.partition(":")
        makes = getattr(importlib.import_module(module), attribute)
        folder = importlib.import_module(group.folder)
        if group.none is not None:
            parts.append(f"### `{group.key}` = `{group.none!r}`\n\nSwitched off.")
        for name in settings.names_in(folder, makes):
            component = settings.resolve(folder, name, makes)
            parts.append(f"### `{group.key}` = `{name!r}`\n\n{summary(component)}")
            own = settings.settings_of(component, group.given, group.affects)
            if own:
                parts.append(table(own, described(component)))
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    return re.sub(r":math:`([^`]+)`", r"$\1$", text)


if __name__ == "__main__":
    PATH.write_text(page())

"""What `mkdocs.yml` calls to build the site: pages that lie elsewhere, and the API reference.

The README is the first page. The API reference has a page for each package, with all public names.
"""

import importlib
import inspect
import posixpath
import re
import textwrap
from html import unescape
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

from ant_jax import config as config_lib
from ant_jax import settings

ROOT = Path(__file__).parents[1]
# The pages that do not lie in this folder.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "times.md",
    "experiments/RESULTS.md": "results.md",
}
PACKAGES = {
    "mtl": "ant_jax.mtl",
    "clustering": "ant_jax.tasks.clustering",
    "clusterings": "ant_jax.tasks.clusterings",
    "clusters": "ant_jax.tasks.clusters",
    "transfer_gap": "ant_jax.tasks.transfer_gap",
    "affinity": "ant_jax.tasks.affinity",
    "diffusion": "ant_jax.diffusion",
    "samplers": "ant_jax.diffusion.samplers",
    "loss_weights": "ant_jax.diffusion.loss_weights",
    "models": "ant_jax.models",
    "optimizers": "ant_jax.optimizers",
    "schedules": "ant_jax.schedules",
    "train_step": "ant_jax.train_step",
    "data": "ant_jax.data",
    "evaluation": "ant_jax.evaluation",
    "features": "ant_jax.evaluation.features",
    "metrics": "ant_jax.evaluation.metrics",
    "settings": "ant_jax.settings",
    "train": "ant_jax.train",
    "sample": "ant_jax.sample",
    "evaluate": "ant_jax.evaluate",
    "run": "ant_jax.workdir.run",
}


def on_files(files, config):
    """Adds the pages that lie elsewhere, their pictures, and the API reference."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for picture in (ROOT / "experiments" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    shown = set()
    for name, package in PACKAGES.items():
        files.append(File.generated(config, f"api/{name}.md", content=_reference(package, shown)))
    return files


def on_page_markdown(markdown, page, **_):
    """Turns links between files of the repository into links between pages."""
    sources = {page: source for source, page in PAGES.items()}
    here = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def link(found):
        text, target = found.groups()
        path, mark, heading = target.partition("#")
        if not path or ":" in path:
            return found[0]
        path = posixpath.normpath(posixpath.join(here, path))
        if path in PAGES:
            path = f"docs/{PAGES[path]}"
        elif path.startswith("experiments/results/") and path.endswith(".png"):
            path = path.replace("experiments/", "docs/")
        if path.startswith("docs/") and not path.endswith((".py", ".sh")):
            return f"[{text}]({path.removeprefix('docs/')}{mark}{heading})"
        # Code is not on the site.
        return text

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, markdown)


def on_page_content(html, **_):
    """Turns formulas into MathML, which browsers show without a script."""
    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', _formula, html, flags=re.DOTALL)


def _formula(found):
    # Without the brackets \( \) or \[ \].
    tex = unescape(found[2])[2:-2].replace(r"\arg", r"\mathrm{arg}\,")
    formula = convert(tex, display="inline" if found[1] == "span" else "block")
    if "\\" in re.sub("<[^>]*>", "", formula):
        raise ValueError(f"latex2mathml does not know all commands of {tex}")
    return formula


def _reference(package, shown):
    """A page; what a page before it has shown is left out."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == package
    ]
    values = [*(getattr(module, name) for name in names), *_components(module)]
    lines = [f"# {package}", "", inspect.getdoc(module).replace("::\n", ":\n"), ""]
    known = (value for value in values if inspect.isclass(value) or inspect.isfunction(value))
    for path in (f"{value.__module__}.{value.__qualname__}" for value in known):
        if path not in shown:
            lines += [f"::: {path}", ""]
        shown.add(path)
    return "\n".join(lines)


def _components(folder):
    """The components that a config can name, which a package need not export."""
    kinds = {group.folder: group.makes for group in config_lib.GROUPS if group.folder}
    kinds["ant_jax.evaluation.metrics"] = "ant_jax.evaluation:Metric"
    if folder.__name__ not in kinds:
        return []
    module, _, attribute = kinds[folder.__name__].partition(":")
    makes = getattr(importlib.import_module(module), attribute)
    return [settings.resolve(folder, name, makes) for name in settings.names_in(folder, makes)]


class Docstrings(griffe.Extension):
    """Markdown instead of the formulas and code blocks of reStructuredText."""

    def on_object(self, *, obj, **_):
        """Rewrites the docstring of a module, class or function."""
        if obj.docstring:
            obj.docstring.value = markdown_of(obj.docstring.value)


def markdown_of(docstring):
    r"""Formulas ``:math:`x``` become ``$x$``; what follows ``::`` becomes a block of code."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", docstring)
    text = re.sub(r"\.\. math::\s+(.+)", r"$$\1$$", text)
    # A list of figures, each with its name.
    text = re.sub(
        r"(?<=^Figures:\n)(?:  .*\n?|\n)*",
        lambda found: re.sub(r"(?m)^  (\w+): ", r"  - `\1`: ", found[0]),
        text,
        flags=re.MULTILINE,
    )

    def block(found):
        return f":\n\n```python\n{textwrap.dedent(found[1]).strip()}\n```\n"

    return re.sub(r"::\n\n((?:[ ]+.*(?:\n|$)|\n(?=[ ]))+)", block, text)

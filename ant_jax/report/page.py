"""The HTML of a report: a skeleton, a style and a script, with the content inlined."""

import html as html_lib
import json
from importlib import resources
from typing import Any


def html(content: dict[str, Any], plotly: str) -> str:
    """One page that needs no other file.

    Args:
      content: see `summary.summarize`, and "made", when it was made.
      plotly: the source of plotly.js.
    """
    files = resources.files("ant_jax.report")
    names = [run["name"] for run in content["runs"]]
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    # "</script>" in a name would end the content.
    encoded = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = (files / "page.html").read_text()
    for mark, text in {
        "TITLE": html_lib.escape(title),
        "STYLE": (files / "page.css").read_text(),
        "SCRIPT": (files / "page.js").read_text(),
        "CONTENT": encoded,
        "PLOTLY": plotly,
    }.items():
        # Only the marks of the skeleton: what was inserted before may contain the same words.
        before, after = page.split(f"%%{mark}%%", 1)
        page = before + text + after
    return page

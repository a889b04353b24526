"""Sphinx settings of the documentation site: `make docs` builds it, and every warning is an error.

The pages are plain Markdown, read on GitHub as well; index.md holds the navigation. The page of commands is generated
here, from the command itself, so that it cannot go stale.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bifrost import __version__

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "Bifrost"
author = "the Bifrost authors"
version = release = __version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"Bifrost {release}"
html_copy_source = html_show_sourcelink = False
html_show_copyright = False
# README.md is the index for readers on GitHub; the site has its navigation for that.
exclude_patterns = ["README.md"]
myst_heading_anchors = 4
pygments_style = pygments_dark_style = "default"


def commands() -> str:
    """Every command with its arguments and options, in Markdown, as typer documents it."""
    words = [sys.executable, "-m", "typer", "bifrost.trainer.cli.main", "utils", "docs", "--name", "bifrost"]
    made = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    return made.partition("\n")[2]  # without its title


def relinked(text: str, folder: Path, page: Path) -> str:
    """Text written for `folder` as part of `page`: links to either README lead to the site's first page, those to files
    outside of this folder to copies of them."""

    def link(match: re.Match[str]) -> str:
        file, mark, anchor = match[1].partition("#")
        target = (folder / file).resolve()
        if target in (ROOT / "README.md", DOCS / "README.md"):
            return f"](/index.md{mark}{anchor})"
        if target.is_relative_to(DOCS):
            return f"](/{target.relative_to(DOCS)}{mark}{anchor})"
        return f"](path:{os.path.relpath(target, page.parent)})"

    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", link, text)


def read(app: Any, name: str, source: list[str]) -> None:
    """Complete a page as it is read."""
    page = DOCS / f"{name}.md"
    text = relinked(source[0], page.parent, page)
    if name == "index":
        text = relinked((ROOT / "README.md").read_text(encoding="utf-8"), ROOT, page) + text.partition("\n\n")[2]
    elif name == "cli":
        text += commands()
    source[0] = text


def setup(app: Any) -> None:
    app.connect("source-read", read)

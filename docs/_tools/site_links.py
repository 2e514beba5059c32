"""Pages that stand elsewhere in the repository, and links to them.

Every Markdown file links to its neighbours as they stand in the repository, so that a
link works wherever the file is read. Here these links are turned into links to pages.
"""

import os
import re
import urllib.request
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
MADE = DOCS / "made"
# Where a file outside of docs/ is found on the site.
COPIES = {
    ROOT / "CONTRIBUTING.md": MADE / "contributing.md",
    ROOT / "CHANGELOG.md": MADE / "changelog.md",
    **{
        path: MADE / "tables" / path.name
        for path in (ROOT / "benchmarks" / "results").glob("*.md")
    },
}
PAGES = {
    **COPIES,
    ROOT / "README.md": DOCS / "index.md",
    **{
        path: DOCS / "gallery" / f"{path.stem}.rst"
        for path in (ROOT / "examples").glob("*.py")
    },
}
LINK = re.compile(r"\]\(([\w./-]+)(#[\w-]+)?\)")


def rewritten(text: str, source: Path, page: Path) -> str:
    """The text of a page, where the links of the file ``source`` lead to pages."""

    def link(match: re.Match) -> str:
        target = (source.parent / match[1]).resolve()
        if not target.exists():
            return match[0]
        if target in PAGES:
            target = PAGES[target]
        where = os.path.relpath(target, page.parent)
        return f"]({where}{match[2] or ''})"

    return LINK.sub(link, text)


def to_pages(app, docname: str, content: list[str]) -> None:
    """Sphinx calls it with the text of each page that it has read."""
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".md" and MADE not in page.parents:
        content[0] = rewritten(content[0], page, page)


def copy_pages() -> None:
    """Copy the pages that stand elsewhere in the repository."""
    for source, page in COPIES.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(rewritten(source.read_text(), source, page))


def reachable(manuals: dict[str, str]) -> dict[str, tuple[str, None]]:
    """The manuals whose inventories can be fetched now."""
    found = {}
    for name, url in manuals.items():
        try:
            urllib.request.urlopen(url + "objects.inv", timeout=3).close()
        except OSError:
            print(f"no links into the manual of {name}: {url} is out of reach")
        else:
            found[name] = (url, None)
    return found

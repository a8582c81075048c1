"""Whether every link of a built site leads somewhere: to a file in it, and to a place in that file.

    python docs/check_links.py build/site

Prints the dead ones and exits with 1. Links to other sites are for `make docs-links`.
"""

from __future__ import annotations

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and the places that links can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect href, src and id."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


read = cache(Page)


def dead_links(site: Path) -> list[str]:
    """``page: link`` for every link within the site that leads nowhere."""
    dead = []
    for path in sorted(site.rglob("*.html")):
        for link in read(path).links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            found = target.is_file()
            if found and target.suffix == ".html":
                found = unquote(url.fragment) in read(target).places
            if not found:
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


def main() -> int:
    """Check the site in the folder that the command line names."""
    site = Path(sys.argv[1]).resolve()
    dead = dead_links(site)
    pages = len(list(site.rglob("*.html")))
    print(*(dead or [f"{pages} pages, no dead link"]), sep="\n")
    return int(bool(dead) or not pages)


if __name__ == "__main__":
    sys.exit(main())

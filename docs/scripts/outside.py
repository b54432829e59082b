"""A hook of mkdocs: files outside docs/ that its pages link to stand in the site too.

On a code host `../multirun_reports/...` is the file itself. The site has a copy of it, under its
path in the repository, and the links of a page lead there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = "docs/"
# The target of a link or a picture, without its anchor; none with a scheme, as https: has.
_TARGET = re.compile(r"(?<=\]\()[^)#:\s]+(?=[)#])")


def _targets(markdown: str, source: str) -> list[str]:
    """Where the local links of a page lead, as paths in the repository; so is `source`."""
    folder = posixpath.dirname(source)
    return [posixpath.normpath(posixpath.join(folder, t)) for t in _TARGET.findall(markdown)]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds what the pages link to outside docs/, and what these files link to."""
    unread = [DOCS + page.src_uri for page in files.documentation_pages()]
    while unread:
        source = unread.pop()
        for path in _targets((REPOSITORY / source).read_text(), source):
            outside = not path.startswith(DOCS) and (REPOSITORY / path).is_file()
            if outside and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(REPOSITORY / path)))
                if path.endswith(".md"):
                    unread.append(path)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as paths in the site, which has the folder docs/ as its root."""
    source = page.file.src_uri
    source = source if page.file.generated_by else DOCS + source
    here = posixpath.dirname(source.removeprefix(DOCS)) or "."

    def in_site(target: re.Match[str]) -> str:
        (path,) = _targets(f"]({target[0]})", source)
        return posixpath.relpath(path.removeprefix(DOCS), here)

    return _TARGET.sub(in_site, markdown)

"""Makes the README's links absolute, since a page of the package index has no files beside it.

    python release/absolute_links.py README.md https://host/owner/repository v0.1.0

writes the file over. The release workflow does so before it builds the source archive.
"""

import re
import sys
from pathlib import Path

# The target of a Markdown link or picture, or of an HTML attribute, that names no host.
_RELATIVE = r"(?P<target>(?![a-z]+:|#|/)[^)\s\"]+)"
_PICTURE = re.compile(rf"(?P<before>!\[[^\]]*\]\(|\bsrc(?:set)?=\"){_RELATIVE}")
_LINK = re.compile(rf"(?P<before>\]\(|\bhref=\"){_RELATIVE}")


def absolute_links(text: str, repository: str, *, revision: str) -> str:
    """Return Markdown whose relative links are of a repository's files at a revision.

    Args:
        text: The Markdown.
        repository: Its address, as `https://host/owner/repository`.
        revision: A tag, branch or commit.
    """
    text = _PICTURE.sub(rf"\g<before>{repository}/raw/{revision}/\g<target>", text)
    return _LINK.sub(rf"\g<before>{repository}/blob/{revision}/\g<target>", text)


def main() -> None:
    """Rewrite the file that the command line names."""
    path, repository, revision = sys.argv[1:]
    file = Path(path)
    text = file.read_text("utf-8")
    file.write_text(absolute_links(text, repository.rstrip("/"), revision=revision), "utf-8")


if __name__ == "__main__":
    main()

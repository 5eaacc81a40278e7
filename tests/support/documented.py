"""What the documentation says: its pages, their commands, links and quoted code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md")
    for page in ROOT.glob(pattern)
)

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Command:
    """A command of a ``console`` block, continuation lines joined."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text}"

    @property
    def words(self) -> list[str]:
        """The words of the command, without what it writes to."""
        words = shlex.split(self.text)
        return words[: words.index(">")] if ">" in words else words


def commands(page: Path) -> Iterator[Command]:
    """All lines that begin with a dollar sign in the ``console`` blocks of a page."""
    name = str(page.relative_to(ROOT))
    for first, content in blocks(page, "console"):
        lines = [line.strip() for line in content.splitlines()]
        for number, line in enumerate(lines):
            if not line.startswith("$ "):
                continue
            text, following = line.removeprefix("$ "), number + 1
            while text.endswith("\\"):
                text = text.removesuffix("\\") + lines[following]
                following += 1
            yield Command(name, first + number, text)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks in a language with the numbers of their first lines."""
    text = page.read_text()
    for block in _BLOCK.finditer(text):
        if block[2] == language:
            yield text.count("\n", 0, block.start(3)) + 1, block[3]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", page.read_text())


def inline_code(page: Path) -> list[str]:
    """What stands between backticks in the text of a page."""
    return [" ".join(code.split()) for code in _CODE.findall(prose(page))]


def links(page: Path) -> list[str]:
    """Targets of the links and images of a page."""
    return [target or image for target, image in _LINK.findall(_CODE.sub("", prose(page)))]


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

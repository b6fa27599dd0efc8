"""The repository's Markdown files, taken apart: links, anchors, code spans, shell commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "conf", "launch", "opd_ray", "tests")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(`+)(.+?)\1")
_LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """One Markdown file; `path` is absolute."""

    path: Path

    @property
    def name(self) -> str:
        """Path from the repository's root."""
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """The file without its code blocks."""
        return _FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        """Contents of the code blocks in a language; an empty name means plain blocks."""
        return [body for found, body in _FENCE.findall(self.text) if found == language]

    def links(self) -> list[str]:
        """Targets of links and pictures that lead to no other site."""
        targets = [markdown or html for markdown, html in _LINK.findall(_SPAN.sub("", self.prose))]
        return [target for target in targets if not re.match(r"[a-z]+:", target)]

    def spans(self) -> list[str]:
        """Contents of code spans."""
        return [content.strip() for _, content in _SPAN.findall(self.prose)]

    def anchors(self) -> set[str]:
        """Anchors of the headings, as GitHub makes them."""
        found: dict[str, int] = {}
        anchors = set()
        for heading in _HEADING.findall(self.prose):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            anchors.add(f"{slug}-{found[slug]}" if slug in found else slug)
            found[slug] = found.get(slug, 0) + 1
        return anchors

    def commands(self) -> list[list[str]]:
        """Words of each shell command, those of code spans included; comments and variables are taken out."""
        lines = [line for block in self.blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
        lines += [span for span in self.spans() if " " in span and re.match(r"python -m |opd-ray |bash ", span)]
        commands = []
        variables: dict[str, str] = {}
        for line in lines:
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if words and (assigned := re.fullmatch(r"([A-Z]+)=(\S+)", words[0])) and len(words) == 1:
                variables[assigned[1]] = assigned[2]
            elif words:
                commands.append(words)
        return commands


def pages() -> list[Page]:
    """Every Markdown file of the repository, the main README first."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md"))]
    return [Page(ROOT / "README.md"), *map(Page, paths)]

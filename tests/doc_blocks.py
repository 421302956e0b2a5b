"""The code blocks of README and docs, and what is checked of those that are not Python."""

import itertools
import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import typer
from markdown_it import MarkdownIt

from bge_rerank_adapters.cli import app

ROOT = Path(__file__).parent.parent
SERVER = "http://gpu-box:8000"
API_KEY = "change-me"
NOT_RUN = re.compile(r"<!-- not run: \S.*-->")
SEPARATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<"}
# What a reader's shell has, and what no test should start.
KNOWN_WORDS = {
    ".", "cat", "cd", "conda", "docker", "echo", "export", "git", "helm", "hf", "kubectl", "ls",
    "mkdir", "opentelemetry-instrument", "podman", "ray", "source", "tail", "uv",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what should be printed, if a block says so."""

    page: Path
    line: int
    language: str
    text: str
    run: bool = True
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def code(self) -> Any:
        """The Python block compiled, with its page's lines in tracebacks."""
        return compile("\n" * self.line + self.text, str(self.page), "exec")


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks; one of `output` belongs to the block right before it."""
    found: list[Block] = []
    tokens = MarkdownIt().parse(page.read_text("utf-8"))
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type != "fence":
            continue
        language = (token.info.split() or [""])[0]
        run = not (before and before.type == "html_block" and NOT_RUN.match(before.content))
        if language == "output":
            last = found.pop()
            found.append(Block(page, last.line, last.language, last.text, last.run, token.content))
        else:
            found.append(Block(page, token.map[0] + 1, language, token.content, run))
    return found


def commands(text: str) -> list[list[str]]:
    """Return the commands of a shell block as lists of words, without prompts and comments."""
    found: list[list[str]] = [[]]
    for line in text.replace("\\\n", " ").splitlines():
        found.append([])
        words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        words.whitespace_split = True
        for word in words:
            if word in SEPARATORS:
                found.append([word] if word in {">", ">>", "<"} else [])
            else:
                found[-1].append(word)
    return [words for words in found if words and words[0] not in {">", ">>", "<"}]


def check_command(words: list[str], url: str) -> None:
    """Raise where a command of the documentation could not run: its name, options, or extras."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    name, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if name in {"python", "python3"} and arguments[:1] == ["-m"]:
        name, arguments = arguments[1], arguments[2:]
    if name in {"bge-rerank", "bge_rerank_adapters"}:
        _parse(arguments)
    elif name in {"python", "python3"}:
        assert (ROOT / arguments[0]).is_file(), arguments
    elif name == "pip":
        _check_extras(arguments)
    elif name == "make":
        assert all(re.search(rf"(?m)^{each}:", _makefile()) for each in arguments), arguments
    elif name == "curl":
        _ask(arguments, url)
    elif name in {"uvicorn", "hypercorn", "granian", "serve"}:
        module, _, attribute = next(each for each in arguments if ":" in each).partition(":")
        assert hasattr(import_module(module), attribute), arguments
    elif name.startswith("benchmarks."):
        source = "".join(path.read_text("utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
        options = [each for each in arguments if each.startswith("--")]
        assert find_spec(name), name
        assert all(f'"{each}"' in source for each in options), arguments
    else:
        assert name in KNOWN_WORDS or find_spec(name), f"teach tests/doc_blocks.py {name!r}"


def _makefile() -> str:
    return (ROOT / "Makefile").read_text("utf-8")


def _parse(arguments: list[str]) -> None:
    """Parse a command line of `bge-rerank` without running it."""
    group: Any = typer.main.get_command(app)
    if arguments in (["--version"], ["-h"], ["--help"]):
        return
    context = group.make_context("bge-rerank", list(arguments), resilient_parsing=True)
    name, command, rest = group.resolve_command(context, list(arguments))
    if rest not in (["-h"], ["--help"]):
        command.make_context(name, rest, parent=context)


def _check_extras(arguments: list[str]) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for argument in arguments:
        for extras in re.findall(r"(?:bge-rerank-adapters|\.)\[(.*?)\]", argument):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), extras


def _ask(arguments: list[str], url: str) -> None:
    """Send what a line of curl would send to the test's own server."""
    address = next(each for each in arguments if re.match(r"https?://|localhost|127\.", each))
    path = re.sub(r"^(https?://)?[^/]+", "", address)
    options = dict(itertools.pairwise(arguments))
    fields = [after for before, after in itertools.pairwise(arguments) if before == "-H"]
    headers = dict(re.split(r":\s*", each, maxsplit=1) for each in fields)
    body = options.get("-d") or options.get("--data") or options.get("--json")
    answer = httpx.request("POST" if body else "GET", url + path, headers=headers, content=body)
    assert answer.status_code == 200, answer.text

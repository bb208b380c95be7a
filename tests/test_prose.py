"""The written part of the repository: docstrings, README's length, links, code of the pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

import vitlinear

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    path
    for folder in ("vitlinear", "tools", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if ".suite" not in path.parts  # timm's own tests, fetched
) + [ROOT / "vitlinear_cli.py"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"] + sorted(
    path for folder in ("docs", "benchmarks", "configs") for path in (ROOT / folder).rglob("*.md")
)
# Pages whose Python is a program: its blocks run in order, in one process.
PROGRAMS = ("README.md", "docs/use.md", "docs/attention.md", "docs/mixers.md", "docs/padding.md")
CODE = re.compile(r"^(`{3,})(.*?)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
# What a block may need that is not here: it is then only checked for its syntax.
NEEDS = ("needs-weights", "needs-gpu", "needs-mmdet")


def name_of(path: Path) -> str:
    """The path in the repository, as a test's id."""
    return path.relative_to(ROOT).as_posix()


def docstrings(path: Path) -> list[tuple[str, str]]:
    """Where a docstring stands, and the docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            line = node.body[0].lineno
            found.append((f"{name_of(path)}:{line}", text))
    return found


def blocks(path: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: what follows the fence, and the code."""
    return [(info, code) for _, info, code in CODE.findall(path.read_text(encoding="utf-8"))]


def anchors(path: Path) -> set[str]:
    """The names under which a page's headings are linked to."""
    text = CODE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}


def test_docstrings_say_what_a_thing_is() -> None:
    """The first line names the thing, or says what it does; it does not begin with "What"."""
    everything = [found for path in MODULES for found in docstrings(path)]
    assert len(everything) > 1000
    wrong = [
        f"{where} {text.splitlines()[0]}"
        for where, text in everything
        if re.match(r"What\b", text) or "Calls each." in text
    ]
    assert not wrong, "\n".join(wrong)


def test_readme_is_short() -> None:
    """A newcomer reads it whole; more belongs into docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    order = [text.index(f"\n## {title}\n") for title in (
        *("Install", "First result", "Models", "Attention as a function", "Speed"),
        *("Documentation", "Cite", "Licence"),
    )]  # fmt: skip
    assert order == sorted(order)
    for command in ("tools/quickstart.py", "tools/run_tests.py"):
        assert f"python3 {command}" in text and (ROOT / command).exists()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files of the repository, and headings that they have."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert not wrong


def test_every_page_is_in_the_index() -> None:
    """docs/README.md has a row for each page beside it."""
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {name for name in pages if f"({name})" not in index} == set()


def test_every_result_is_in_an_account() -> None:
    """Each committed file of benchmarks/results is named by a page, so that nothing gets lost."""
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    results = sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir())
    assert results and [name for name in results if name not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_of_the_pages_is_python(page: Path) -> None:
    """Every block that says it is Python can be parsed; its other words are known."""
    for info, code in blocks(page):
        language, *words = info.split()[:2] if info else [""]
        if language == "python":
            assert all(word in NEEDS for word in words), info
            ast.parse(code)


@pytest.mark.parametrize("page", PROGRAMS)
def test_python_of_the_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks are one program; what it prints is what its comments say."""
    code = "\n".join(code for info, code in blocks(ROOT / page) if info == "python")
    assert code
    exec(compile(code, page, "exec"), {})
    printed = capsys.readouterr().out
    for line in re.findall(r"print\(.*\)  # (torch\.Size\(.*?\)|\([\d, ]+\))", code):
        assert line in printed


def test_contributing_shows_every_room() -> None:
    """The tree of CONTRIBUTING.md has the rooms and files of the package, and no others."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {name.rstrip("/") for name in re.findall(r"^ {6}(\w+(?:/|\.py))", text, re.MULTILINE)}
    there = {
        path.name
        for path in (ROOT / "vitlinear").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert shown == there - {"__init__.py", "__main__.py"}


def test_citation() -> None:
    """The keys that CFF 1.2.0 requires are there, and the version is ours."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"authors", "cff-version", "message", "title"} <= citation.keys()
    assert str(citation["cff-version"]) == "1.2.0" and citation["authors"]
    assert citation["version"] == vitlinear.__version__ and citation["license"] == "Apache-2.0"

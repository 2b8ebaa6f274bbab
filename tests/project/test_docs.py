"""The pages: the links, tests and commands that they name exist.

The file maps are complete.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.project.test_layout import project_files
from tests.support.processes import ROOT

FENCE = re.compile(r"^```.*?^```", re.M | re.S)
# Old names are history there: what a note or a changelog entry said is not rewritten.
HISTORY = ("bench/NOTES.md", "CHANGELOG.md")
PAGES = sorted(file for file in project_files() if file.suffix == ".md")
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = (
    "nanovlm_fast",
    "nanovlm_fast/packing",
    "nanovlm_fast/data",
    "nanovlm_fast/model",
    "nanovlm_fast/weights",
    "nanovlm_fast/training",
    "nanovlm_fast/tune",
    "nanovlm_fast/chat",
    "nanovlm_fast/reporting",
    "kernels",
    "bench",
    "tests",
)
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def targets(text: str) -> list[str]:
    """The targets of a page's links, images and HTML images, except those on other hosts."""
    text = re.sub(r"`[^`\n]*`", "", text)  # inline code may hold brackets that are no link
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    found += re.findall(r'\b(?:src|srcset|href)="([^"]+)"', text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, formed as GitHub does; a repeated heading gets a number."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        name, repeated = slug, 0
        while name in found:
            repeated += 1
            name = f"{slug}-{repeated}"
        found.add(name)
    return found


def broken(page: Path, target: str) -> bool:
    place, _, anchor = target.partition("#")
    file = (page.parent / place).resolve() if place else page
    if not file.exists() or not file.is_relative_to(ROOT):
        return True
    return bool(anchor) and (file.suffix != ".md" or anchor not in anchors(file))


def test_the_checks_find_what_they_look_for(tmp_path):
    """Every fault of a page is found and nothing else; otherwise the tests below could not fail."""
    text = "# A `b` c\n[x](there.md#a-b-c) [y](gone.md)\n```\n[no](link.md)\n```\n# A b c\n"
    text += (
        '![p](there.md#a-b-c-1) `[z](code.md)` <img src="none.png"> [w](https://example.org/a.md)'
    )
    page = tmp_path / "there.md"
    page.write_text(text)
    assert anchors(page) == {"a-b-c", "a-b-c-1"}
    found = targets(prose(page))
    assert found == ["there.md#a-b-c", "gone.md", "there.md#a-b-c-1", "none.png"]
    inside = ROOT / "README.md"
    assert (
        broken(inside, "gone.md") and broken(inside, "README.md#gone") and broken(inside, "#gone")
    )
    assert not broken(inside, "LICENSE") and not broken(inside, "#use-it")
    assert broken(inside, "LICENSE#use-it") and broken(inside, "..")


@every_page
def test_every_link_and_image_leads_somewhere(page):
    assert not [target for target in targets(prose(page)) if broken(page, target)]


@every_page
def test_every_test_that_a_page_names_exists(page):
    """Tests are named as `tests/FOLDER/FILE.py::NAME`.

    A reader would not find a name without its path.
    """
    text = page.read_text()
    named = re.findall(r"([\w/.]+\.py)::(\w+)", text)
    files = {name: ROOT / name for name, _ in named}
    assert not [name for name in files if not name.startswith("tests/")]
    assert not [name for name, file in files.items() if not file.is_file()]
    assert not [name for file, name in named if f"def {name}(" not in files[file].read_text()]


def test_the_claims_name_their_proofs():
    """Every row of the two tables of claims, and enough rows to show that the tables were found."""
    for name, least in (("nanovlm_fast/weights", 11), ("nanovlm_fast/training", 10)):
        text = (ROOT / name / "README.md").read_text()
        table = re.search(
            r"^\| what[^\n]*\| proved by \|\n\| ---[^\n]*\n((?:\|[^\n]*\n)+)", text, re.M
        )
        rows = table.group(1).splitlines()
        assert len(rows) >= least
        assert not [row for row in rows if not re.search(r"`tests/[\w/]+\.py[`:]", row)]


@every_page
def test_every_file_and_command_that_a_page_names_exists(page):
    if str(page.relative_to(ROOT)) in HISTORY:
        return
    named = re.findall(r"`([\w./]+\.(?:py|sh|md|toml|txt))`", prose(page))
    places = {name: (ROOT / name, page.parent / name) for name in named if name != "__init__.py"}
    assert not [name for name, tries in places.items() if not any(file.exists() for file in tries)]
    for module in re.findall(r"python -m ((?:nanovlm_fast|bench)\b[\w.]*)", page.read_text()):
        place = ROOT / module.rstrip(".").replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


# ---- README.md


def test_the_readme_is_short_and_opens_with_what_a_newcomer_needs():
    """What it is, a picture and the two commands fit the first screen of a phone."""
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 9216
    opening = r"# nanovlm_fast\n\n(.+?)\n\n(!\[.+?\]\(.+?\))\n\n```bash\n(.+?)```"
    what, picture, commands = re.match(opening, text, re.S).groups()
    shown = re.sub(r"\]\([^)]*\)", "", what)
    assert len(shown) <= 300 and "\n\n" not in what and "\n" not in picture
    first, second = commands.splitlines()
    assert first == "pip install -e . && python train.py"
    assert second == "pip install -e '.[test]' && pytest"
    assert "**Nothing here has run on a GPU yet.**" in text or not cpu_only()


def cpu_only() -> bool:
    """Whether no committed result comes from a GPU."""
    results = (ROOT / "bench" / "results").glob("*/*.json")
    return not any('"driver"' in file.read_text() for file in results)


# ---- file maps


def mapped(page: Path) -> list[str]:
    """The names in the first column of the page's first table.

    This table must be the page's map, with the header `file | what it holds`.
    """
    rows = re.search(r"^\|.*\n\| ---.*\n(?:\|.*\n)+", page.read_text(), re.M).group(0).splitlines()
    assert rows[0].startswith("| file"), f"{page} does not open with its file map"
    return [name for row in rows[2:] for name in re.findall(r"`([\w./]+)`", row.split(" | ")[0])]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folders_readme_names_every_file_once(folder):
    """A folder without a page of its own may be named whole, or by its files."""
    here = ROOT / folder
    names = mapped(here / "README.md")
    assert sorted(set(names)) == sorted(names), "named twice"
    files = [file.relative_to(here) for file in project_files() if file.is_relative_to(here)]
    unnamed, used = [], set()
    for file in files:
        ways = [str(file), *(f"{parent}/" for parent in file.parents if str(parent) != ".")]
        by = [way for way in ways if way in names]
        used |= set(by)
        if len(by) > 1 or not (by or file.name in ("README.md", "__init__.py")):
            unnamed.append(str(file))
    assert not unnamed, "not named once"
    links = {entry.name for entry in here.iterdir() if entry.is_symlink()}
    assert used | links >= set(names), "named, but not there"
    assert len(files) > 3

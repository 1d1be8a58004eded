"""If this fails, a page of the documentation shows text as code, code as text, a link to nothing, or tells
of a setting or a command that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.settings import ENVIRONMENT_PREFIX, Settings

_ROOT = Path(__file__).parents[1]
_PAGES = sorted(
    path.relative_to(_ROOT)
    for folder in ("", "docs/**/", "k8s/**/", "tests/**/")
    for path in _ROOT.glob(f"{folder}*.md")
)
_FILES = [  # that name settings of the server beside the pages
    *(_ROOT / name for name in ("Dockerfile", "docker-compose.yml", "docker/.env.example")),
    *(path for suffix in ("cfg", "yml", "yaml") for path in _ROOT.glob(f"docker/**/*.{suffix}")),
    *_ROOT.glob("k8s/**/*.yaml"),
]
_NO_SETTINGS = {
    "LAMAMBA_NAME",  # stands for any of them
    "LAMAMBA_SERVICE_HOST",  # what Kubernetes would set
}


@pytest.mark.parametrize("page", _PAGES, ids=str)
def test_every_block_of_code_is_closed_before_the_next_begins(page: Path) -> None:
    fences = [line for line in (_ROOT / page).read_text(encoding="utf-8").splitlines() if line[:3] == "```"]
    assert len(fences) % 2 == 0
    assert set(fences[1::2]) <= {"```"}, "a language at the end of a block"


@pytest.mark.parametrize("page", _PAGES, ids=str)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    text = (_ROOT / page).read_text(encoding="utf-8")
    targets = {target for target in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in target}
    assert [target for target in sorted(targets) if not _leads_somewhere(target, page)] == []


def test_a_link_to_a_heading_that_there_is_not_is_found() -> None:
    page = Path("k8s/README.md")
    assert _leads_somewhere("#what-it-does", page)
    assert _leads_somewhere("../docs/scaling.md#with-ray-serve", page)
    assert not _leads_somewhere("../docs/scaling.md#with-rays", page)
    assert not _leads_somewhere("docs/scaling.md", page)


def test_every_setting_that_is_told_of_is_one() -> None:
    settings = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields} | _NO_SETTINGS
    told = {
        name: path
        for path in [*(_ROOT / page for page in _PAGES), *_FILES]
        for name in re.findall(rf"\b{ENVIRONMENT_PREFIX}[A-Z0-9_]+(?<!_)\b", path.read_text(encoding="utf-8"))
    }
    assert len(told) > 20
    assert {name: path for name, path in told.items() if name not in settings} == {}


def test_every_target_of_make_that_is_told_of_is_one() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (_ROOT / "Makefile").read_text(), re.MULTILINE))
    told = {
        target
        for page in _PAGES
        for target in re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", (_ROOT / page).read_text(), re.MULTILINE)
    }
    assert {"serve", "test", "test-k8s"} <= told <= targets


def _leads_somewhere(target: str, page: Path) -> bool:
    """Whether there is the file of a relative link, and in a page its heading, as GitHub names headings."""
    name, _, heading = target.partition("#")
    path = _ROOT / page.parent / name if name else _ROOT / page
    if not path.exists():
        return False
    if not heading or path.suffix != ".md":
        return True
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

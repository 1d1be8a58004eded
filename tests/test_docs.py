"""If this fails, a page of the documentation shows text as code, code as text, or a link to nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_PAGES = sorted(path.relative_to(_ROOT) for path in [*_ROOT.glob("*.md"), *_ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", _PAGES, ids=str)
def test_every_block_of_code_is_closed_before_the_next_begins(page: Path) -> None:
    fences = [line for line in (_ROOT / page).read_text(encoding="utf-8").splitlines() if line[:3] == "```"]
    assert len(fences) % 2 == 0
    assert set(fences[1::2]) <= {"```"}, "a language at the end of a block"


@pytest.mark.parametrize("page", _PAGES, ids=str)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    text = (_ROOT / page).read_text(encoding="utf-8")
    targets = {
        target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in target
    }
    missing = [target for target in targets - {""} if not (_ROOT / page.parent / target).exists()]
    assert not missing

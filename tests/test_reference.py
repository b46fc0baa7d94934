"""The pages in docs/reference are what the command line and the configuration make of them."""

import runpy
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"


@pytest.mark.skipif(not REFERENCE.exists(), reason="the wheel has no docs")
@pytest.mark.parametrize(
    ("page", "writer"), [("commands.md", "commands"), ("config.md", "configuration")]
)
def test_a_generated_page_is_up_to_date(page: str, writer: str) -> None:
    made = runpy.run_path(str(REFERENCE / "write.py"))[writer]()
    stale = "`make reference` writes docs/reference again"
    assert (REFERENCE / page).read_text(encoding="utf-8") == made, stale

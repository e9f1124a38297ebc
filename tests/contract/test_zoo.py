"""docs/zoo.md says of every architecture of the gallery whether it is read, and bounds that hold."""

from __future__ import annotations

import pytest
from gallery import GALLERY
from zoo_table import PAGE, captured, listed, page, row

from lipguard.errors import LipguardError

LISTED = listed(PAGE.read_text(encoding="utf-8"))


def test_the_page_lists_the_gallery() -> None:
    assert list(LISTED) and set(LISTED) == set(GALLERY)


# One in eight, and a different eighth of each family: neighbours are of one kind.
@pytest.mark.parametrize("name", list(GALLERY)[::8])
def test_a_sample_is_read_or_refused_as_listed(name: str) -> None:
    try:
        captured(GALLERY[name])
        read = True
    except LipguardError:
        read = False
    assert read == LISTED[name]


@pytest.mark.slow
def test_all_are_read_or_refused_as_listed() -> None:
    rows = {name: row(name) for name in GALLERY}
    assert {name: one.read for name, one in rows.items()} == LISTED
    assert listed(page(rows)) == LISTED
    # a refusal says what to do
    assert all("submodule=" in one.cells[0] or "Use " in one.cells[0] for one in rows.values() if not one.read)

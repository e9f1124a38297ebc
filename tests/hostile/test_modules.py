"""A sample of the random modules in every run of the suite, all of them on request; see `modules`."""

from __future__ import annotations

import pytest
from modules import Verdict, judged


def check(verdicts: list[Verdict]) -> None:
    assert [(v.seed, v.names, v.faults) for v in verdicts if v.faults] == []
    honest = [v for v in verdicts if v.harmless]
    assert len(honest) >= len(verdicts) // 3
    refused = [(v.seed, v.names, v.reason) for v in honest if v.value is None]
    assert len(refused) <= 0.1 * len(honest), refused


def test_a_sample_of_random_modules() -> None:
    check(judged(range(80)))


@pytest.mark.slow
def test_random_modules() -> None:
    check(judged(range(5000)))

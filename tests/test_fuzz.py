"""Every fuzz target for a few seconds, a minute in all; `make fuzz` runs them for as long as wanted."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import targets
from tests.fuzz.harness import report, run

SECONDS = 60.0
TARGETS = targets()


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_no_input_is_answered_with_a_traceback_or_takes_too_much(name: str) -> None:
    tally = run(TARGETS[name], seed=0, seconds=SECONDS / len(TARGETS))
    assert tally.cases and not tally.findings, report([tally])

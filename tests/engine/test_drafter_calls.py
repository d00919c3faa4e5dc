"""A drafter that fails in every step is logged once for each failure, and counted every time."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from harness import make_llm, run

from folospec import Drafter, register_drafter


class FailingDrafter(Drafter):
    """Fails for every request, with another error for the longer ones."""

    def propose(self, requests: Any) -> Any:
        if len(requests[0].token_ids) % 2:
            raise KeyError("odd")
        raise IndexError("even")


register_drafter("failing", FailingDrafter)


def test_a_failure_is_logged_once_and_counted_every_time(
    models: Any, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(models.target, "failing", strict_drafters=False)
    with caplog.at_level(logging.DEBUG, "folospec.spec.drafter_calls"):
        found = run(llm)
    records = [record for record in caplog.records if record.name == "folospec.spec.drafter_calls"]
    errors = [record for record in records if record.levelno == logging.ERROR]
    assert {record.exc_info[0] for record in errors if record.exc_info} == {KeyError, IndexError}
    assert len(errors) == 2
    assert len(records) == found.stats["num_drafter_errors"] > 2

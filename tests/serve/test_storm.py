"""A small storm: `python -m tests.serve.storm` is the long one, which judges memory, too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.serve.storm import Answered, broken_chats, grown, lost_lines, storm
from tests.serve.storm_plan import Ask, plan

N_REQUESTS = 60


@pytest.mark.slow
def test_nothing_is_lost(tmp_path: Path) -> None:
    passed, wrong = storm(tmp_path, N_REQUESTS, seed=3)
    assert not wrong, "\n".join(wrong)
    manners = Counter(each.ask.manner for each in passed.found)
    assert len(manners) == 7 and sum(each.is_whole for each in passed.found) > N_REQUESTS // 3, manners


def test_a_plan_follows_from_its_seed() -> None:
    assert plan(50, 1) == plan(50, 1) != plan(50, 2)


def test_what_is_wrong_is_seen() -> None:
    ask = Ask(0, "chat", "whole", {"messages": [], "stream": True}, more="x")
    before, after = Answered(ask, 200, ids=[[3]], prompt=[1, 2], is_whole=True), Answered(ask, 200, prompt=[1, 2, 4])
    assert broken_chats([before, after]) and not broken_chats([before, Answered(ask, 200, prompt=[1, 2, 3, 4])])
    before.request_id = "req_1"
    assert lost_lines("", [before]) and not lost_lines("req_1 POST\n", [before])
    assert lost_lines("req_1 POST\nm2lite: internal error\n", [before]) == ["m2lite: internal error"]
    assert grown([5, 9, 6, 12]) == 3

from typing import Any

import pytest

from job.cluster.scheduler import ALONE, ClusterSpec
from job.cluster.workers import Workers
from job.config import UserError


def test_one_that_is_alone_gets_back_what_it_gives() -> None:
    alone = Workers(ALONE)
    assert (alone.count, alone.is_chief) == (1, True)
    assert alone.gather({"a": "é"}) == [{"a": "é"}]
    assert alone.broadcast(b"content") == b"content"
    alone.require_equal({"a": 1})


def test_workers_that_differ_are_named(
    three_workers: ClusterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Workers(three_workers)
    told: list[dict[str, Any]] = [
        {"seed": 1, "data_dir": "a"},
        {"seed": 1, "data_dir": "a"},
        {"seed": 2},
    ]
    monkeypatch.setattr(one, "gather", lambda document: told)
    monkeypatch.setattr(one, "leave", lambda: None)
    with pytest.raises(UserError) as caught:
        one.require_equal(told[0])
    name = three_workers.name(2)
    assert f"{name} has seed 2, {three_workers.name(0)} 1; {name} has data dir None" in str(
        caught.value
    )
    assert three_workers.name(1) not in str(caught.value)

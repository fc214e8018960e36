from __future__ import annotations

import pytest

from lockstep.server.errors import ApiError
from lockstep.server.limits import RateLimit


def test_each_client_has_its_own_requests_per_minute():
    limit = RateLimit(2)
    for client in ("a", "b", "a", "b"):
        limit.check(client)
    with pytest.raises(ApiError, match="More than 2 requests") as refusal:
        limit.check("a")
    assert refusal.value.status == 429
    assert 0 < (refusal.value.retry_after_s or 0) <= 60


def test_without_a_limit_everyone_may_come():
    limit = RateLimit(None)
    for _ in range(1000):
        limit.check("a")

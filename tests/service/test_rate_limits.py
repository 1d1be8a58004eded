"""service/rate_limits.py: if this fails, one client takes what belongs to all, or memory grows for ever."""

from __future__ import annotations

from typing import Any

import pytest

from service.api_keys import key_hash
from service.errors import QuotaExceeded, RateLimited
from service.rate_limits import RateLimits
from tests.service.conftest import ClientFactory

BODY: dict[str, Any] = {"class_id": 2, "steps": 1, "seed": 9}


class Clock:
    def __init__(self) -> None:
        self.now = 100 * 86_400.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, *, minute: int = 0, day: int = 0, request: int = 1, clients: int = 9) -> RateLimits:
    return RateLimits(
        images_per_minute=minute,
        images_per_day=day,
        max_images_per_request=request,
        max_clients=clients,
        clock=clock,
    )


def spend(accounts: RateLimits, client: str, num_images: int) -> None:
    with accounts.spending(client, num_images):
        pass


def test_bucket_fills_with_time_and_says_when_there_is_enough() -> None:
    clock = Clock()
    accounts = limits(clock, minute=6)
    spend(accounts, "a", 6)
    with pytest.raises(
        RateLimited, match="2 images given and 0 are left; this server accepts 6 a minute"
    ) as no:
        spend(accounts, "a", 2)
    assert no.value.retry_after_s == pytest.approx(20.0)
    spend(accounts, "b", 6)
    clock.now += 20.0
    spend(accounts, "a", 2)
    clock.now += 3600.0
    spend(accounts, "a", 6)
    with pytest.raises(RateLimited):
        spend(accounts, "a", 1)


def test_a_limit_below_the_largest_request_still_serves_it() -> None:
    clock = Clock()
    accounts = limits(clock, minute=1, request=16)
    spend(accounts, "a", 16)
    clock.now += 16 * 60
    spend(accounts, "a", 16)


def test_quota_begins_anew_at_midnight() -> None:
    clock = Clock()
    clock.now += 86_390
    accounts = limits(clock, day=3)
    spend(accounts, "a", 3)
    with pytest.raises(QuotaExceeded, match="1 images given after 3 of today") as no:
        spend(accounts, "a", 1)
    assert no.value.retry_after_s == 10.0
    clock.now += 10
    spend(accounts, "a", 3)


def test_what_is_not_accepted_is_not_counted() -> None:
    accounts = limits(Clock(), minute=2, day=2)

    def fail() -> None:
        with accounts.spending("a", 2):
            raise ValueError("the queue is full")

    with pytest.raises(ValueError, match="full"):
        fail()
    spend(accounts, "a", 2)


def test_only_so_many_clients_are_remembered_the_latest() -> None:
    accounts = limits(Clock(), minute=1, clients=2)
    for client in ("a", "b", "c"):
        spend(accounts, client, 1)
    assert len(accounts._accounts) == 2
    with pytest.raises(RateLimited):
        spend(accounts, "c", 1)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/generate", BODY), ("/v1/images/generations", {"prompt": "forest", "steps": 1})],
    ids=["ours", "openai"],
)
def test_both_routes_answer_429_by_key(client_of: ClientFactory, path: str, body: dict[str, Any]) -> None:
    client = client_of(
        api_keys=f"a:{key_hash('one')},b:{key_hash('two')}",
        rate_limit_images_per_minute=1,
        max_images_per_request=1,
    )
    assert client.post(path, json=body, headers={"X-API-Key": "one"}).status_code == 200
    refusal = client.post(path, json=body, headers={"X-API-Key": "one"})
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "rate_limited")
    assert 1 <= int(refusal.headers["retry-after"]) <= 60
    assert client.post(path, json=body, headers={"X-API-Key": "two"}).status_code == 200
    assert 'lamamba_rejections_total{code="rate_limited"} 1.0' in client.get("/metrics").text


def test_without_keys_the_address_counts_and_the_quota_answers_429(client_of: ClientFactory) -> None:
    client = client_of(quota_images_per_day=1)
    assert client.post("/generate", json=BODY).status_code == 200
    refusal = client.post("/generate", json=BODY)
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "quota_exceeded")

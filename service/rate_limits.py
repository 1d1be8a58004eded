"""How many images one client may ask for: a token bucket by the minute and a quota by the day (UTC).

A bucket holds what a minute brings, or one largest request where that is more: else a small limit would
refuse large requests for ever. Images that the engine does not accept are not counted. Only so many clients
are remembered; the one that has been away for longest is forgotten first. Used on the event loop.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from service.errors import QuotaExceeded, RateLimited

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["RateLimits"]

_DAY_S: Final = 86_400
_MAX_CLIENTS: Final = 10_000


@dataclass
class _Account:
    tokens: float
    filled_at: float
    day: int
    images_today: int = 0


class RateLimits:
    """The accounts of all clients."""

    def __init__(
        self,
        *,
        images_per_minute: int,
        images_per_day: int,
        max_images_per_request: int,
        max_clients: int = _MAX_CLIENTS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """A limit of 0 is none; `clock` gives seconds since 1970, by which days begin."""
        self._images_per_minute = images_per_minute
        self._images_per_day = images_per_day
        self._capacity = max(images_per_minute, max_images_per_request)
        self._max_clients = max_clients
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    @contextmanager
    def spending(self, client: str, num_images: int) -> Iterator[None]:
        """Count the images, unless what is done meanwhile raises.

        Raises RateLimited or QuotaExceeded, with the time to wait, before anything is counted.
        """
        if not self._images_per_minute and not self._images_per_day:
            yield
            return
        now = self._clock()
        account = self._account(client, now)
        if self._images_per_minute and num_images > account.tokens:
            raise RateLimited(
                f"rate limit: {num_images} images given and {int(account.tokens)} are left; this server "
                f"accepts {self._images_per_minute} a minute of one client",
                retry_after_s=(num_images - account.tokens) * 60 / self._images_per_minute,
            )
        if self._images_per_day and account.images_today + num_images > self._images_per_day:
            raise QuotaExceeded(
                f"daily quota: {num_images} images given after {account.images_today} of today (UTC); this "
                f"server accepts {self._images_per_day} a day of one client",
                retry_after_s=_DAY_S - now % _DAY_S,
            )
        yield
        account.tokens -= num_images
        account.images_today += num_images

    def _account(self, client: str, now: float) -> _Account:
        """The client's account, as it stands now."""
        account = self._accounts.pop(client, None)
        if account is None:
            account = _Account(tokens=self._capacity, filled_at=now, day=int(now // _DAY_S))
        self._accounts[client] = account
        if len(self._accounts) > self._max_clients:
            self._accounts.popitem(last=False)
        earned = max(0.0, now - account.filled_at) * self._images_per_minute / 60
        account.tokens = min(self._capacity, account.tokens + earned)
        account.filled_at = now
        if account.day != now // _DAY_S:
            account.day, account.images_today = int(now // _DAY_S), 0
        return account

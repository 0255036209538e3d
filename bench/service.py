"""A reward that another program computes: how it is asked over HTTP, and what a failure means.

A request is repeated, with waits that double, where a later one may succeed: no connection, no answer in time, status
408, 425, 429 or 5xx. A request that stays without a readable answer is a missing score and never a low one. Any other
status is a mistake in the settings and raises BenchError.
"""

import base64
import io
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

import httpx
import numpy as np
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from bench.errors import BenchError
from bench.options import Config

PASSING = {408, 425, 429}  # and 5xx: what a server says when it is busy
LONGEST = 60.0  # seconds between two tries
log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")


class ServiceConfig(Config):
    """Where the service is, and how it is asked."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("key_variable", "timeout", "tries", "wait", "concurrency", "rate")

    endpoint: str = Field("http://localhost:8000", description="its address")
    key_variable: str | None = Field(
        None, description="environment variable with the key that is sent as bearer token; null: none is sent"
    )
    timeout: float = Field(60.0, gt=0, description="seconds until a request counts as unanswered")
    tries: int = Field(5, ge=1, description="of a request before its score counts as missing")
    wait: float = Field(1.0, gt=0, description="seconds before the second try; each further wait is twice as long")
    concurrency: int = Field(16, ge=1, description="requests at a time, of each process")
    rate: float | None = Field(None, gt=0, description="requests a second at most, of each process; null: no bound")

    @field_validator("endpoint")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            url = httpx.URL(value)
        except httpx.InvalidURL as error:
            raise ValueError(f"no address of a server: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("no address of a server: it begins with http:// or https://")
        if url.userinfo or url.query:
            raise ValueError(
                "settings are stored and published, so no password or key belongs in the address: use key_variable"
            )
        return value.rstrip("/")


class Missing(Exception):
    """There is no score; the message says why."""


class Service:
    """Asks a service. name: of the reward, for messages. Raises BenchError if the key's variable is not set."""

    def __init__(self, name: str, config: ServiceConfig):
        self.name, self.config = name, config
        self._key = os.environ.get(config.key_variable, "") if config.key_variable else ""
        if config.key_variable and not self._key:
            raise BenchError(f"{name}: the environment variable {config.key_variable} holds no key: set it.")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(headers=headers, timeout=config.timeout, follow_redirects=True)
        self._lock, self._turn = threading.Lock(), 0.0

    def map(self, ask: Callable[[Item], Result], items: Iterable[Item]) -> list[Result | None]:
        """`ask` of every item, in their order, `concurrency` at a time. None, and a warning, for Missing."""
        reasons: Counter[str] = Counter()

        def result(item: Item) -> Result | None:
            try:
                return ask(item)
            except Missing as missing:
                reasons[str(missing)] += 1
                return None

        with ThreadPoolExecutor(self.config.concurrency) as threads:
            results = list(threads.map(result, items))
        if reasons:
            reason_counts = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
            lacking = sum(reasons.values())
            log.warning("%s: %d of %d requests brought no score: %s", self.name, lacking, len(results), reason_counts)
        return results

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the service answers to a JSON object.

        Raises Missing without a readable answer in all tries, BenchError for a status that repeating cannot change.
        """
        reason, wait = "", 0.0
        for number in range(self.config.tries):
            time.sleep(wait)
            wait = min(self.config.wait * 2**number, LONGEST)
            self._wait_for_turn()
            try:
                response = self._client.post(self.config.endpoint + path, json=body)
                if response.is_success:
                    return response.json()
                reason = f"status {response.status_code}"
                wait = max(wait, _seconds(response.headers.get("Retry-After", "")))
            except httpx.RequestError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            except ValueError:  # from json(): half an answer, or the page of a proxy
                reason = "its answer is no JSON"
                continue
            if response.status_code not in PASSING and response.status_code < 500:
                answer = " ".join(response.text.split())[:300]
                answer = answer.replace(self._key, "***") if self._key else answer
                raise BenchError(
                    f"{self.name}: {self.config.endpoint}{path} refuses the request with status "
                    f"{response.status_code} ({answer}): check the reward's endpoint, its other options and its key."
                )
        raise Missing(f"{self.config.endpoint}{path} gave no answer in {self.config.tries} tries, at last {reason}")

    def _wait_for_turn(self) -> None:
        if self.config.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._turn = max(self._turn, now)
            wait, self._turn = self._turn - now, self._turn + 1 / self.config.rate
        time.sleep(wait)


def _seconds(text: str) -> float:
    """A `Retry-After` in seconds, at most `LONGEST`; 0 for none, and for a date."""
    return min(float(text), LONGEST) if text.isdecimal() else 0.0


def pixels(images: Tensor) -> np.ndarray:
    """Float images [B, 3, H, W] in [0, 1] as uint8 [B, H, W, 3]."""
    return (255 * images.detach()).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def png(image: np.ndarray) -> str:
    """A uint8 image [H, W, 3] as PNG, in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()

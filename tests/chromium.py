"""A headless Chromium that tests drive over its pipe: no driver, no port, no package."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Page:
    """One tab. events: what Chromium reported so far."""

    def __init__(self, sent: int, received: int):
        self.sent, self.received = sent, received
        self.buffer = b""
        self.last = 0
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            more = os.read(self.received, 1 << 16)
            if not more:
                raise AssertionError("Chromium ended")
            self.buffer += more
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.last += 1
        request: dict[str, Any] = {"id": self.last, "method": method, "params": params}
        if self.session is not None:
            request["sessionId"] = self.session
        left = json.dumps(request).encode() + b"\0"
        while left:
            left = left[os.write(self.sent, left) :]
        while True:
            message = self._message()
            if message.get("id") == self.last:
                assert "error" not in message, message
                return message["result"]
            if "method" in message:
                self.events.append(message)

    def open(self, path: pathlib.Path) -> None:
        self.events = [e for e in self.events if e["method"] != "Page.loadEventFired"]
        self.call("Page.navigate", url=path.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self._message())

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression, as JSON has it."""
        out = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in out, out["exceptionDetails"]
        return out["result"].get("value")

    def point(self, selector: str, *, click: bool = False) -> None:
        """Moves the mouse to an element's middle, as a hand would: what lies above gets it."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{found}.scrollIntoView({{block: 'center'}})")
        left, top, width, height = self.value(
            f"(({{x, y, width, height}}) => [x, y, width, height])({found}.getBoundingClientRect())"
        )
        place = {"x": left + width / 2, "y": top + height / 2}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)


@contextmanager
def chromium() -> Iterator[Page]:
    """A page in a browser of its own. Skips where there is no Chromium."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip("no chromium (Debian: apt-get install chromium)")
    to_browser, from_browser = os.pipe(), os.pipe()
    arguments = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # root may not have one
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads its descriptor 3 and writes its 4, so ours have higher numbers.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_browser[0], from_browser[1])]
        os.close(to_browser[0])
        os.close(from_browser[1])
        plumbing = f'exec 3<&{high[0]} 4>&{high[1]}; exec "$@"'
        process = subprocess.Popen(
            ["bash", "-c", plumbing, "bash", found, *arguments, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in high:
            os.close(end)
        watch = threading.Timer(120, process.kill)  # a browser that hangs ends the pipe, and so the test
        watch.start()
        try:
            yield Page(to_browser[1], from_browser[0])
        finally:
            watch.cancel()
            os.close(to_browser[1])
            process.terminate()
            process.wait(30)
            os.close(from_browser[0])

"""vLLM's OpenAI-compatible server as a process of its own, and requests to it."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Without the second, vLLM refuses every request that carries processor keywords.
SWITCHES = ("--enforce-eager", "--trust-request-mm-kwargs")


def command(model: Path, port: int, **arguments: object) -> list[str]:
    given = {
        "model": model, "served-model-name": "tiny", "host": "127.0.0.1", "port": port, "dtype": "float32",
        "max-model-len": 1024, "block-size": 32, "kv-cache-memory-bytes": 64 << 20, "seed": 0, **arguments,
    }  # fmt: skip
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *SWITCHES, *flags]


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port: int = own.getsockname()[1]
        return port


class Server:
    def __init__(self, port: int, log: Path) -> None:
        self.root, self.log = f"http://127.0.0.1:{port}", log

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.root + path, timeout=60) as answer:
            text: str = answer.read().decode()
            return text

    def chat(self, text: str, image: Any = None, **extra: Any) -> tuple[int, str]:
        """Status and body of a greedy answer."""
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if image is not None:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        body = {
            "model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 12,
            "ignore_eos": True, **extra,
        }  # fmt: skip
        request = urllib.request.Request(
            self.root + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextmanager
def serving(model: Path, log: Path, environment: dict[str, str], **arguments: object) -> Iterator[Server]:
    port = free_port()
    with log.open("w") as out:
        process = subprocess.Popen(command(model, port, **arguments), stdout=out, stderr=out, env=environment)
    server = Server(port, log)
    try:
        end = time.monotonic() + 400
        while True:
            try:
                server.get("/health")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server did not start: {log.read_text()[-4000:]}") from None
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

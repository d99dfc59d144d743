"""A vLLM server without a model: its routes, payloads and errors as vLLM 0.32 had them, and tokens one can foretell."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT, EOS = "/models/base", 2


def written(adapter: Path | None, prompt: list[int], count: int) -> list[int]:
    """Return the tokens that are written with the adapter in a folder: they depend on its files and the prompt."""
    seed = zlib.crc32((adapter / "adapter_model.safetensors").read_bytes()) if adapter is not None else 0
    return [10 + (seed + sum(prompt) * 7 + n * n) % 80 for n in range(count)]


class FakeVLLM(ThreadingHTTPServer):
    """The server, on a free port of this machine; use it as a context manager."""

    daemon_threads = True

    def __init__(self, *, context: int = 64, port: int = 0, runtime: bool = True, key: str | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.adapters: dict[str, str] = {}
        self.context, self.runtime, self.key, self.root = context, runtime, key, ROOT
        self.bodies: list[dict[str, Any]] = []
        self.loads: list[str] = []
        self.aborted = 0
        self.go = threading.Event()
        """Tokens after the first of an answer wait for this."""
        self.go.set()
        self.stop_after: int | None = None
        self.break_after: int | None = None
        self.refuse_load: tuple[int, str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet: clients go away in these tests."""

    @contextmanager
    def running(self) -> Iterator[FakeVLLM]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.go.set()
            self.shutdown()
            self.server_close()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """The routes."""

    server: FakeVLLM
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        fake = self.server
        if fake.key is not None and self.headers.get("authorization") != f"Bearer {fake.key}":
            self._json(401, {"error": "Unauthorized"})
            return
        cards = [{"id": "base", "object": "model", "root": fake.root, "parent": None, "max_model_len": fake.context}]
        cards += [{"id": name, "object": "model", "root": root, "parent": "base", "max_model_len": None}
                  for name, root in fake.adapters.items()]  # fmt: skip
        self._json(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/completions":
            self._completion(body)
        elif self.path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.server.runtime:
            self._load(body) if self.path == "/v1/load_lora_adapter" else self._unload(body)
        else:
            self._json(404, {"detail": "Not Found"})

    def _load(self, body: dict[str, Any]) -> None:
        fake, name, place = self.server, body["lora_name"], body["lora_path"]
        if fake.refuse_load is not None:
            self._fail(fake.refuse_load[0], "InternalServerError", fake.refuse_load[1])
        elif name in fake.adapters:
            self._fail(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded. If you want to "
                       "load the adapter in place, set 'load_inplace' to True.")  # fmt: skip
        elif not (Path(place) / "adapter_config.json").exists():
            self._fail(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {place}")
        else:
            fake.adapters[name] = place
            fake.loads.append(name)
            self._text(200, f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, body: dict[str, Any]) -> None:
        name = body["lora_name"]
        if not name:
            self._fail(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
        elif self.server.adapters.pop(name, None) is None:
            self._fail(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        else:
            self._text(200, f"Success: LoRA adapter '{name}' removed successfully.")

    def _completion(self, body: dict[str, Any]) -> None:
        fake = self.server
        fake.bodies.append(body)
        if body["model"] not in {"base", *fake.adapters}:
            self._fail(404, "NotFoundError", f"The model `{body['model']}` does not exist.")
            return
        place = fake.adapters.get(body["model"])
        tokens = written(Path(place) if place else None, body["prompt"], body["max_tokens"])
        if fake.stop_after is not None and not body["ignore_eos"]:
            tokens = [*tokens[: fake.stop_after], EOS]
        self._start("text/event-stream; charset=utf-8")
        try:
            self._stream(body, tokens)
        except OSError:
            fake.aborted += 1

    def _stream(self, body: dict[str, Any], tokens: list[int]) -> None:
        fake = self.server
        for n, token in enumerate(tokens):
            while n and not fake.go.is_set():  # as vLLM does, see that the client is gone
                time.sleep(0.01)
                self._chunk(": nothing yet\n\n")
            if n == fake.break_after:
                self.close_connection = True
                return
            last = n == len(tokens) - 1
            reason = ("stop" if token == EOS else "length") if last else None
            choice: dict[str, Any] = {"index": 0, "text": f" {token}", "logprobs": None, "finish_reason": reason,
                                      "stop_reason": None, "token_ids": [token],
                                      "prompt_token_ids": None if n else body["prompt"]}  # fmt: skip
            if body["logprobs"] is not None:
                top = {f"token_id:{token + k}": -0.5 - k for k in range(body["logprobs"] + 1)}
                choice["logprobs"] = {"text_offset": [0], "token_logprobs": [-0.5], "tokens": [f"token_id:{token}"],
                                      "top_logprobs": [dict(reversed(top.items()))]}  # fmt: skip
            self._chunk(f"data: {json.dumps({'id': 'cmpl-1', 'model': body['model'], 'choices': [choice]})}\n\n")
        self._chunk("data: [DONE]\n\n")
        self._chunk("")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _start(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def _fail(self, code: int, kind: str, message: str) -> None:
        self._json(code, {"error": {"message": message, "type": kind, "param": None, "code": code}})

    def _json(self, code: int, value: Any) -> None:
        self._text(code, json.dumps(value), "application/json")

    def _text(self, code: int, text: str, kind: str = "text/plain") -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

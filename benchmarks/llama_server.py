"""llama.cpp's own server as a peer: a native `llama-server` process, asked over HTTP by one thread for each request."""

import http.client
import json
import socket
import subprocess
import threading
import time
from pathlib import Path

from llama_parallel import LlamaOptions
from serving_results import Completion
from serving_workload import ServingRequest

START_SECONDS, ANSWER_SECONDS = 120, 900


class LlamaServer:
    """A llama-server of this process's own, on a free port of the loopback interface."""

    def __init__(self, path: Path, options: LlamaOptions, max_length: int, threads: int, binary: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        arguments = {
            "--model": path,
            "--port": self.port,
            "--parallel": options.slots,
            "--ctx-size": options.slots * max_length,
            "--threads": threads,
            "--threads-batch": threads,
            "--batch-size": options.batch,
            "--ubatch-size": options.micro_batch,
            "--flash-attn": "on" if options.flash_attention else "off",
        }
        command = [binary, "--kv-unified" if options.unified_cache else "--no-kv-unified"]
        command += [str(word) for pair in arguments.items() for word in pair]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def serve(self, requests: list[ServingRequest]) -> list[Completion]:
        """Send every request at its arrival; tokens are streamed, and so timed, when the requests arrive one by one."""
        completions = [Completion() for _ in requests]
        errors: list[Exception] = []
        start = time.perf_counter()
        ask = self._stream if requests[-1].arrival > 0 else self._ask

        def run(request: ServingRequest, completion: Completion) -> None:
            try:
                ask(request, completion, start)
            except Exception as error:
                errors.append(error)

        threads = [
            threading.Thread(target=run, args=(request, completion))
            for request, completion in zip(requests, completions, strict=True)
        ]
        for thread, request in zip(threads, requests, strict=True):
            time.sleep(max(0.0, request.arrival - (time.perf_counter() - start)))
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return completions

    def close(self) -> None:
        """End the server."""
        self.process.terminate()
        self.process.wait()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self.process.returncode}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"llama-server was not ready after {START_SECONDS} s")

    def _ask(self, request: ServingRequest, completion: Completion, start: float) -> None:
        completion.tokens = json.load(self._post(request, streaming=False))["tokens"]

    def _stream(self, request: ServingRequest, completion: Completion, start: float) -> None:
        for line in self._post(request, streaming=True):
            if line.startswith(b"data: {"):
                tokens = json.loads(line[6:])["tokens"]
                completion.tokens += tokens
                completion.seconds += [time.perf_counter() - start] * len(tokens)

    def _post(self, request: ServingRequest, *, streaming: bool) -> http.client.HTTPResponse:
        body = {
            "prompt": request.prompt,
            "n_predict": request.new_tokens,
            "samplers": ["top_k"],
            "top_k": 1,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": True,
            "return_tokens": True,
            "stream": streaming,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"llama-server answers {response.status}: {response.read()[:500]!r}")
        return response

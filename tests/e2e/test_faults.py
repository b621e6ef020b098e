"""A server whose engine dies says so and ends, with no process left and no client waiting for ever."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

pytestmark = pytest.mark.e2e

MODEL = "smollm2-135m"
POOL = "server_args.max_total_tokens=4096"


@pytest.mark.parametrize("process_name", ["sglang::scheduler", "sglang::detokenizer"])
def test_a_dead_engine_ends_the_server_and_its_streams(process_name: str, tmp_path: Path, start_server: Any) -> None:
    log = tmp_path / "log"
    with start_server(["server", "--profile", MODEL, "--set", POOL], log) as (url, process):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        [part] = [member for member in family if process_name in " ".join(member.cmdline())]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Count to a thousand."}],
            max_tokens=1500,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        part.kill()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            for _ in stream:
                pass
        assert process.wait(timeout=120) not in (0, None)
        said = log.read_text(errors="replace")
        assert re.search(rf"Subprocess {process_name.removeprefix('sglang::')}\S* .* crashed with exit code -9", said)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_sigterm_under_load_finishes_every_stream(tmp_path: Path, start_server: Any) -> None:
    """New requests are refused with 503 meanwhile, and the server ends with 0."""
    log = tmp_path / "log"
    with start_server(["server", "--profile", MODEL, "--set", POOL], log) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)

        def open_stream(number: int) -> Any:
            return client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Tell me about the number {number}."}],
                max_tokens=96,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )

        streams = [open_stream(number) for number in range(6)]
        begun = [next(iter(stream)) for stream in streams]
        assert len(begun) == 6
        process.terminate()
        _wait_for(lambda: _refused(open_stream), 30)
        reasons = [[choice.finish_reason for chunk in stream for choice in chunk.choices][-1] for stream in streams]
        assert reasons == ["length"] * 6
        assert process.wait(timeout=120) == 0


def _refused(open_stream: Callable[[int], Any]) -> bool:
    try:
        open_stream(99).close()
    except openai.APIStatusError as refusal:
        return refusal.status_code == 503
    return False


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)

"""Two requests through the server's own HTTP port: it speculates, and it can sample, before it is announced."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import httpx

from sglang_auf.errors import ServerError

PROBE_HEADER = "x-auf-probe"
PROMPT = "The capital city of France is"
# More than one block of any drafter, so that a verify step must happen; short enough for a slow CPU.
NEW_TOKENS = 64
# The first token after prefill and one of a verify step are drawn by different code.
SAMPLED_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Probe:
    """How to reach the server.

    url: base URL.
    token: what lets the probe through the gate while it is closed.
    answer_s: seconds that the port may take to open.
    reply_s: seconds that one short answer may take.
    """

    url: str
    token: str
    api_key: str | None = None
    answer_s: float = 120.0
    reply_s: float = 600.0

    def run(self, needs_verify_steps: bool) -> int:
        """Number of verify steps of one short greedy answer, after which a few tokens were sampled too.

        It asks /generate, whose `meta_info` has SGLang's own count, with `log_metrics` off, so that neither the totals
        nor SGLang's metrics count requests that no client sent. Raises ServerError when there is no answer, or no
        verify step and `needs_verify_steps`.
        """
        # The server is this process: no proxy is in between, and its certificate does not name the loopback address.
        with httpx.Client(base_url=self.url, headers=self._headers(), trust_env=False, verify=False) as client:
            self._wait_for_port(client)
            meta_info = self._generate(client, temperature=0, max_new_tokens=NEW_TOKENS)
            self._generate(client, temperature=1, max_new_tokens=SAMPLED_TOKENS)
        steps = int(meta_info.get("spec_verify_ct") or 0)
        if needs_verify_steps and steps == 0:
            raise ServerError(
                f"the server answered {meta_info.get('completion_tokens')} tokens without one verify step",
                "verify steps in every answer of more than one token",
                "it decodes plainly: look above for what the plugin logged, or serve without a drafter (--plain)",
            )
        return steps

    def _headers(self) -> dict[str, str]:
        bearer = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {PROBE_HEADER: self.token} | bearer

    def _wait_for_port(self, client: httpx.Client) -> None:
        deadline = time.monotonic() + self.answer_s
        while True:
            try:
                client.get("/health", timeout=5)  # any status: 503 is what a starting server says
                return
            except httpx.HTTPError as error:
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"no answer at {self.url} within {self.answer_s:.0f} s ({error!r})",
                        "the port open",
                        "look above for an error of the HTTP server",
                    ) from error
            time.sleep(0.2)

    def _generate(self, client: httpx.Client, **sampling_params: Any) -> dict[str, Any]:
        body = {
            "text": PROMPT,
            "sampling_params": sampling_params | {"ignore_eos": True},
            "log_metrics": False,
        }
        try:
            reply = client.post("/generate", json=body, timeout=self.reply_s)
            reply.raise_for_status()
            meta_info: dict[str, Any] = reply.json()["meta_info"]
        except httpx.HTTPStatusError as error:
            raise ServerError(
                f"the probe got HTTP {error.response.status_code}: {error.response.text[:500]}",
                "an answer",
                "look above for the error of the engine",
            ) from error
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ServerError(f"the probe got no answer ({error!r})", "an answer", "look above for an error") from error
        return meta_info

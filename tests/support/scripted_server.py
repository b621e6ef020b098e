"""SGLang's own HTTP server and tokenizer manager over a scheduler that plays back what the prompt says.

No model runs. Everything between the HTTP request and the scheduler is SGLang's code with this plugin's hooks on it,
in a separate process, so that the hooks reach no other test. A prompt is a script, one word per token:

    "3 0 7 cut 2 next 1"    choice 0: the first token, then steps that accept 3, 0 and 7 drafts, the last 2 tokens cut
                            off by a stop; choice 1: the first token, then one step that accepts 1 draft
    "5 abort"               ends as a running request that is aborted does; "queue" ends like one aborted in the queue
    "think 2 5"             2 of the tokens are reasoning
    "call 3 0 7"            the tokens of the answer are those of CALL, as far as they reach

It starts as an AUF server. POST /algorithm?name=DFLASH turns it into a server of SGLang's own algorithm, and POST
/algorithm into one that decodes plainly. GET /totals returns the totals of this process, and GET /spans the number of
choices whose spans it keeps. Answers are recorded in DIRECTORY/rows, and GET /recording says what was. /metrics has
what a server of ours adds to it, and one reader of figures that always fails.

Run: scripted_server.py DIRECTORY PORT
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from array import array
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

BLOCK = 8
WORDS = [str(number) for number in range(BLOCK)] + ["cut", "next", "abort", "queue", "think", "</s>", "<unk>", "call"]
CALL = re.findall(
    r"</?tool_call>|\n|[^\w\n<]+|\w+",
    'Let me look. <tool_call>\n{"name": "look", "arguments": {"city": "Bern"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
)
"""The tokens of an answer with two tool calls, in the format of Qwen 2.5."""
VOCABULARY = {word: token for token, word in enumerate(dict.fromkeys([*WORDS, *CALL]))}


@dataclass
class Answer:
    """One choice: what a scheduler would count while it made it."""

    accepted: list[int] = field(default_factory=list)
    cut: int = 0
    ending: str = "stop"
    reasoning_tokens: int = 0
    calls: bool = False

    def tokens(self, first: int, last: int) -> tuple[list[int], str]:
        """Ids and text of the tokens from `first` up to `last`."""
        if not self.calls:
            return [0] * (last - first), "a " * (last - first)
        words = (CALL + ["</s>"] * last)[first:last]
        return [VOCABULARY[word] for word in words], "".join(words).replace("</s>", "")


def answers(words: list[str]) -> list[Answer]:
    found = [Answer()]
    rest = iter(words)
    for word in rest:
        match word:
            case "next":
                found.append(Answer())
            case "cut":
                found[-1].cut = int(next(rest))
            case "think":
                found[-1].reasoning_tokens = int(next(rest))
            case "call":
                found[-1].calls = True
            case "abort" | "queue":
                found[-1].ending = word
            case _:
                found[-1].accepted.append(int(word))
    return found


def write_model(directory: Path) -> None:
    """A configuration and a tokenizer; no weights, nothing loads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=WORDS.index("</s>"),
        dtype="bfloat16",
    ).save_pretrained(directory)


class Playback:
    """Answers tokenized requests through `TokenizerManager._handle_batch_output`, as the detokenizer would."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.choices: dict[tuple[int, ...], int] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def dispatch(self, request: Any) -> None:
        from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput, TokenizedGenerateReqInput

        if isinstance(request, BatchTokenizedGenerateReqInput):
            for one in request.batch:
                self.dispatch(one)
        if not isinstance(request, TokenizedGenerateReqInput):
            return  # control messages, such as the one that freezes the garbage collector
        task = asyncio.get_running_loop().create_task(self.play(request))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def play(self, request: Any) -> None:
        prompt = tuple(request.input_ids)
        if request.sampling_params.max_new_tokens == 0:  # the prefill ahead of n > 1
            await self.put(request, 0, 0, Answer(), {"type": "length", "length": 0})
            return
        script = answers([WORDS[token] for token in prompt])
        index = self.choices.get(prompt, 0)
        self.choices[prompt] = index + 1
        answer = script[index % len(script)]
        if answer.ending == "queue":
            self.abort_in_queue(request.rid)
            return
        reason = (
            {"type": "abort", "message": "Aborted"} if answer.ending == "abort" else {"type": "stop", "matched": 13}
        )
        lengths = [1] + [accepted + 1 for accepted in answer.accepted]
        lengths[-1] -= answer.cut
        done = 0
        for step, length in enumerate(lengths):
            done += length
            so_far = replace(answer, accepted=answer.accepted[:step])
            await self.put(request, length, done, so_far, reason if step == len(lengths) - 1 else None)
            await asyncio.sleep(0)

    async def put(self, request: Any, new: int, done: int, answer: Answer, reason: dict[str, Any] | None) -> None:
        from sglang.srt.managers.io_struct import BatchStrOutput
        from sglang.srt.runtime_context import get_spec

        steps = answer.accepted if get_spec().speculative_algorithm else []
        # SGLang grows its histogram only as far as it needs: schedule_batch.py, update_spec_correct_drafts_histogram.
        histogram = [steps.count(accepted) for accepted in range(max(steps, default=-1) + 1)]
        ids, text = answer.tokens(done - new, done)
        unused = {name: [] for name in BatchStrOutput.__struct_fields__ if "logprobs" in name and "flat" not in name}
        self.manager.last_receive_tstamp = time.time()  # as handle_loop does; the health check reads it
        await self.manager._handle_batch_output(
            BatchStrOutput(
                rids=[request.rid],
                finished_reasons=[reason],
                output_strs=[text],
                output_ids=[array("q", ids)],
                prompt_tokens=[len(request.input_ids)],
                completion_tokens=[done],
                reasoning_tokens=[answer.reasoning_tokens],
                cached_tokens=[0],
                **unused,
                output_token_entropy_val=None,
                output_token_sampling_mask=None,
                output_hidden_states=None,
                routed_experts=None,
                indexer_topk=None,
                placeholder_tokens_idx=None,
                placeholder_tokens_val=None,
                retraction_counts=[0],
                spec_verify_ct=[len(steps)],
                spec_num_correct_drafts=[sum(steps)],
                spec_correct_drafts_histogram=[histogram],
            )
        )

    def abort_in_queue(self, rid: str) -> None:
        from sglang.srt.managers.io_struct import AbortReq

        self.manager._handle_abort_req(AbortReq(rid=rid))


_configuration = ExitStack()


def configure(algorithm: str | None) -> None:
    from sglang.srt.runtime_context import get_spec

    _configuration.close()
    _configuration.enter_context(
        get_spec().override(speculative_algorithm=algorithm, speculative_num_draft_tokens=BLOCK)
    )


def add_test_routes(app: Any, recorder: Any) -> None:
    from sglang_auf.hooks import metrics, spans

    @app.get("/spans")  # type: ignore[untyped-decorator]
    async def choices_with_spans() -> int:
        return len(spans._running)

    @app.get("/recording")  # type: ignore[untyped-decorator]
    async def recording() -> dict[str, Any]:
        return recorder.snapshot()

    @app.get("/totals")  # type: ignore[untyped-decorator]
    async def snapshot() -> dict[str, Any]:
        return metrics.TOTALS.snapshot() | {"generated": metrics.TOTALS.generated}

    @app.post("/algorithm")  # type: ignore[untyped-decorator]
    async def set_algorithm(name: str | None = None) -> None:
        configure(name)


def install_plugin() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from sglang_auf import ALGORITHM, compat, plugin
    from sglang_auf.hooks import metrics, registry, replies, spans
    from sglang_auf.recording import capture

    compat.check_seams(plugin.seams())
    for _ in range(2):  # twice is once
        replies.widen_models()
        registry.install((*replies.HOOKS, *spans.HOOKS, *metrics.HOOKS, *capture.HOOKS))
    HookRegistry.apply_hooks()
    # The name only: the worker behind it belongs to the scheduler, which is a script here.
    SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=True)(lambda _: None)


def start_recorder(app: Any, directory: Path) -> Any:
    """As server.launch does."""
    from server.middleware import Consent
    from sglang_auf.recording import capture
    from sglang_auf.recording.recorder import Recorder
    from sglang_auf.recording.settings import RecordSettings

    recorder = Recorder.opened(RecordSettings(directory=str(directory / "rows")), directory)
    app.add_middleware(Consent, opt_in=False)
    recorder.start()
    capture.record_with(recorder)
    return recorder


def add_figures(recorder: Any) -> None:
    """To /metrics, as server.launch does."""
    from server.routes import add_readers
    from sglang_auf.hooks import metrics

    async def broken() -> Any:
        raise OSError("no such figures")

    metrics.READERS.append(broken)
    add_readers("scripted", None, recorder)


def main(directory: Path, port: int) -> None:
    install_plugin()

    from sglang.srt.entrypoints.http_server import _setup_and_run_http_server, app
    from sglang.srt.managers.tokenizer_manager import ServerStatus, TokenizerManager
    from sglang.srt.parser.template_manager import TemplateManager
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs, ServerArgs
    from sglang.srt.utils import set_prometheus_multiproc_dir

    write_model(directory)
    recorder = start_recorder(app, directory)
    add_test_routes(app, recorder)
    add_figures(recorder)
    arguments = ServerArgs(
        model_path=str(directory),
        served_model_name="scripted",
        device="cpu",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        enable_metrics=True,
        host="127.0.0.1",
        port=port,
        log_level="warning",
        tool_call_parser="qwen25",
    )
    arguments.resolve_once()
    set_prometheus_multiproc_dir()
    publish(arguments, role="tokenizer")
    configure("AUF")
    ports = PortArgs.init_new(arguments)
    manager = TokenizerManager(arguments, ports)
    manager._dispatch_to_scheduler = Playback(manager).dispatch
    manager.server_status = ServerStatus.Up
    templates = TemplateManager()
    templates.initialize_templates(tokenizer_manager=manager, model_path=str(directory))
    _setup_and_run_http_server(
        arguments, manager, templates, ports, [{}], None, execute_warmup_func=lambda *_, **__: True
    )


if __name__ == "__main__":
    # SGLang's whitelist of plugins: none of those installed, the CPU platform included; main installs what is tested.
    os.environ["SGLANG_PLUGINS"] = "none"
    main(Path(sys.argv[1]), int(sys.argv[2]))

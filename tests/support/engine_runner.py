"""Run lists of jobs on SGLang engines, each list in a process of its own, and write the results as JSON.

An engine hooks SGLang and cannot be started twice. So each list is run in a fork of this process, which has imported
SGLang once for all of them and does nothing else. Where there is a GPU it has not: the import looks at the device, and
CUDA does not work in a fork of a process that has used it.

Standard input: a JSON object a line, {"engine": Engine arguments, "out": path, "log": path of its output,
"environment": variables, "features": path or null, "jobs": [{"inputs": [[token ids]], "sampling": {...} or one of each
input, "concurrency": n, "logprobs": bool, "swaps": [drafters], "session": bool}]}. Each job's result is a list of
{"ids", "meta"} and behind them of {"swap"}: of n drafters the k-th is swapped in when k of n + 1 parts of the answers
are there. With "session" the inputs are the turns of one streaming session. Standard output: the exit status of each
list's process, a line each.

features: the hidden states that the drafter is given, one pickled (positions [n], states [n, taps * hidden]) after the
other. Only the CPU platform's scheduler is a fork of the process that hooks it, and writes them.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any


async def run(engine: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    gate = asyncio.Semaphore(job.get("concurrency", 1))
    session = await open_session(engine) if job.get("session") else None

    answers, swaps = len(job["inputs"]), job.get("swaps", [])
    done = 0
    reached = [asyncio.Event() for _ in swaps]

    async def swap(number: int) -> dict[str, Any]:
        from sglang_auf.speculative.swap import ask

        await reached[number].wait()
        reply = await ask(engine.tokenizer_manager, "swap", swaps[number])
        return {"swap": {"seconds": reply.seconds, "requeued": reply.requeued}}

    async def one(number: int) -> dict[str, Any]:
        nonlocal done
        sampling = job["sampling"][number] if isinstance(job["sampling"], list) else job["sampling"]
        async with gate:
            reply = await engine.async_generate(
                input_ids=job["inputs"][number],
                sampling_params=sampling,
                return_logprob=job.get("logprobs", False),
                top_logprobs_num=job.get("top_logprobs", 0),
                session_params=session,
            )
        done += 1
        for place, event in enumerate(reached, 1):
            if done * (len(swaps) + 1) >= answers * place:
                event.set()
        return {"ids": reply["output_ids"], "meta": reply["meta_info"]}

    return list(await asyncio.gather(*map(one, range(answers)), *map(swap, range(len(swaps)))))


def keep_features(file: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def keep(worker: Any, *, target_hidden: Any, positions: Any, **rest: Any) -> None:
        with open(file, "ab") as out:
            pickle.dump((positions.tolist(), target_hidden.float().tolist()), out)

    worker = "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2"
    HookRegistry.register(f"{worker}._append_target_hidden_to_draft_kv_by_loc", keep, HookType.BEFORE)


async def open_session(engine: Any) -> dict[str, str]:
    """The session parameters of requests that are its turns."""
    from sglang.srt.managers.io_struct import OpenSessionReqInput

    opened = OpenSessionReqInput(capacity_of_str_len=1 << 16, streaming=True)
    return {"id": await engine.tokenizer_manager.open_session(opened, None)}


def run_list(task: dict[str, Any]) -> None:
    import sglang

    if task["features"]:
        keep_features(task["features"])
    engine = sglang.Engine(**{"log_level": "warning", "skip_tokenizer_init": True} | task["engine"])
    try:
        results = [engine.loop.run_until_complete(run(engine, job)) for job in task["jobs"]]
        Path(task["out"]).write_text(json.dumps(results))
    finally:
        engine.shutdown()


def fork(task: dict[str, Any]) -> int:
    """Run a list in a child; its exit status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for ours, theirs in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(ours, theirs)
        os.environ.update(task["environment"])
        run_list(task)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    if not Path("/dev/nvidiactl").exists():
        import sglang.srt.entrypoints.engine
        import sglang.srt.managers.scheduler  # noqa: F401

    for line in sys.stdin:
        print(fork(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()

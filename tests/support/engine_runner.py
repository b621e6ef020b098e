"""Run a list of jobs on one SGLang engine in this process and write the results as JSON.

Tests run it in a new process, because an engine forks, hooks SGLang and cannot be started twice.

Standard input: a JSON object {"engine": Engine arguments, "out": path, "jobs": [{"inputs": [[token ids]], "sampling":
{...} or one per input, "concurrency": n, "logprobs": bool}]}. Each job's result is a list of {"ids", "meta", "text"}.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any


async def run(engine: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    gate = asyncio.Semaphore(job.get("concurrency", 1))

    async def one(number: int) -> dict[str, Any]:
        sampling = job["sampling"][number] if isinstance(job["sampling"], list) else job["sampling"]
        async with gate:
            reply = await engine.async_generate(
                input_ids=job["inputs"][number],
                sampling_params=sampling,
                return_logprob=job.get("logprobs", False),
                top_logprobs_num=job.get("top_logprobs", 0),
            )
        return {"ids": reply["output_ids"], "meta": reply["meta_info"]}

    return list(await asyncio.gather(*map(one, range(len(job["inputs"])))))


def main() -> None:
    import sglang

    task = json.load(sys.stdin)
    engine = sglang.Engine(log_level="warning", skip_tokenizer_init=True, **task["engine"])
    try:
        results = [engine.loop.run_until_complete(run(engine, job)) for job in task["jobs"]]
        Path(task["out"]).write_text(json.dumps(results))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()

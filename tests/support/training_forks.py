"""A process that has imported what training needs, once, and forks for each job.

stdin: one JSON object a line, {"function": "module:function", "arguments": {...}, "ranks": n};
stdout: one line for each, the exit statuses of its n processes (negative: the signal that ended one).
Nothing is computed before a fork: a forked process must not inherit threads.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import traceback

import accelerate  # noqa: F401
import torch.distributed.checkpoint.state_dict
import torch.utils.tensorboard
import transformers.models.auto.modeling_auto  # noqa: F401

import sglang_auf.training.trainer  # noqa: F401


def run(job: dict[str, object], rank: int, port: int) -> None:
    module, function = str(job["function"]).split(":")
    ranks = int(str(job["ranks"]))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    if ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    getattr(importlib.import_module(module), function)(**job["arguments"])  # type: ignore[arg-type]


def statuses(job: dict[str, object]) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(int(str(job["ranks"]))):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.dup2(2, 1)  # stdout is the protocol's
        try:
            run(job, rank, port)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for line in sys.stdin:
        print(json.dumps(statuses(json.loads(line))), flush=True)

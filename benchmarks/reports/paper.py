"""Tau on Qwen3-8B at T=0 and T=1 as the tables of arXiv 2607.01893 print it, and what it compares with."""

from __future__ import annotations

TASKS = ("gsm8k", "math500", "humaneval", "mbpp", "mt_bench", "alpaca")

# Arm -> (T=0, T=1), each in the order of TASKS.
DFLASH: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "decay": ((2.29, 2.39, 2.86, 2.85, 2.03, 2.01), (2.21, 2.28, 2.70, 2.74, 1.94, 1.96)),
    "auf+decay": ((2.50, 2.64, 3.09, 3.08, 2.19, 2.14), (2.39, 2.49, 2.88, 2.93, 2.08, 2.09)),
    "auf": ((2.51, 2.64, 3.09, 3.09, 2.18, 2.15), (2.40, 2.50, 2.89, 2.94, 2.06, 2.11)),
}
DOMINO: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "decay": ((2.42, 2.52, 3.10, 3.08, 2.13, 2.13), (2.33, 2.38, 2.89, 2.94, 2.02, 2.11)),
    "b-auf": ((2.51, 2.65, 3.21, 3.17, 2.23, 2.20), (2.41, 2.52, 2.98, 3.04, 2.11, 2.12)),
    "b-auf+d": ((2.52, 2.65, 3.21, 3.18, 2.26, 2.23), (2.40, 2.49, 3.03, 3.01, 2.08, 2.14)),
}

LEVEL = (
    "The paper's figures are of Qwen3-8B with blocks of 16, trained on ShareGPT's original answers for six epochs, one "
    "run an arm, up to 512 new tokens. Its level is low for block drafters on this target (drafters trained on answers "
    "of the target itself are published at 4 to 8) because of that data, not of the objective. Figures of another "
    "target, block size, data set or token limit do not compare with it in level; what may be compared is the change "
    "from one arm to another inside one table."
)


def mean(row: tuple[float, ...]) -> float:
    """The paper's average, in which tasks weigh equally."""
    return sum(row) / len(row)

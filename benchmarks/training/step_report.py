"""What `step` and `rival-steps` write."""

from __future__ import annotations

from pydantic import Field

from benchmarks.harness.config import RivalStepsConfig, StepConfig
from benchmarks.harness.results import Measured, StrictModel


class Cost(StrictModel):
    """One way to make the step. seconds: median of rounds; peak_mib: beyond weights and batch; r_active: kept of B."""

    seconds: float
    rounds: list[float]
    peak_mib: float
    r_active: float


class Cell(StrictModel):
    """One size of batch. Ratios: AUF to each other way; of time, the median of the rounds' ratios."""

    shape: str
    rows: int
    length: int
    anchors: int
    costs: dict[str, Cost]
    time_ratio: dict[str, float]
    memory_ratio: dict[str, float]


class StepReport(Measured):
    """step.json. cells: one a shape; table: anchors x length on one row of the first shape, without the dense variant;
    threads: torch's."""

    config: StepConfig
    cells: list[Cell]
    table: list[Cell]
    threads: int


class RivalStep(StrictModel):
    """One trainer's step: medians over rounds, or the error it ended with.

    attention: the implementation that ran; refused: the ones tried before it, with their errors. tokens_per_s: of the
    row. peak_mib: beyond weights and batch, gradients included.
    """

    trainer: str
    step: str
    version: str | None = None
    torch: str | None = None
    attention: str | None = None
    refused: dict[str, str] = Field(default_factory=dict)
    seconds: float | None = None
    rounds: list[float] = Field(default_factory=list)
    tokens_per_s: float | None = None
    peak_mib: float | None = None
    note: str = ""
    error: str | None = None


class RivalReport(Measured):
    """rival-steps.json."""

    config: RivalStepsConfig
    steps: list[RivalStep]
    threads: int

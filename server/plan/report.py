"""What `python -m server --check` prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from server.launch import Checked, check
from server.plan.memory import LEFT_OUT, LENGTHS, Plan, on_a_cpu, on_cuda, rows_of_head
from server.preflight import Speculation
from server.profile import Profile
from sglang_auf.cpu.memory import GIB, WEIGHT_COPIES
from sglang_auf.env import DRAFT_VOCABULARY, tree_nodes
from sglang_auf.errors import TargetError
from sglang_auf.files import find_model
from sglang_auf.recording.manifest import Manifest
from sglang_auf.recording.ring import State, look_at

Line = tuple[str, str, str]

DECIDED = (
    *("attention_backend", "speculative_draft_attention_backend", "sampling_backend", "kv_cache_dtype", "page_size"),
    *("chunked_prefill_size", "max_running_requests", "max_total_tokens", "mem_fraction_static"),
    *("disable_cuda_graph", "disable_overlap_schedule", "speculative_num_draft_tokens"),
    *("min_free_slots_delay", "sleep_on_idle"),
)
"""Arguments of SGLang that are shown though the profile does not give them: what decides kernels, memory, admission and
waiting."""

OF_THE_DEVICE = ("attention_backend", "speculative_draft_attention_backend")
"""Of these, what SGLang chooses by the device's kind, which is not known where only its memory is given."""

NOT_HERE = "planned for a device of that size: this machine's device, the port and the libraries were not checked"

RECORDING: dict[State, str] = {
    "new": "made at the start",
    "at rest": "goes on",
    "held": "held by a running server, which has to end before this one starts",
}


def report(profile: Profile, here: bool, *, plain: bool = False, api_key: str | None = None) -> list[Line]:
    """(about what, what, how it would be) of the server that this profile starts.

    here: see `device.choose`. Nothing is loaded, and no port stays taken. Raises what the start would raise.
    """
    checked = check(profile, plain=plain, api_key=api_key, here=here)
    target = find_model(checked.target, ("*.json",), TargetError, profile.target_revision)
    recording = list(_recording(checked, target))  # may raise: before the rest is reckoned
    return [
        *_models(checked),
        *_arguments(checked, api_key, here),
        *_memory(checked, target),
        *recording,
        *_notes(profile, here),
        ("result", "server", "would start" if here else "would start on such a device, as far as it was checked"),
    ]


def _models(checked: Checked) -> Iterator[Line]:
    served = checked.served
    yield "serves", "model", served.model
    yield "serves", "target", served.target.name
    yield "serves", "device", checked.profile.device
    if served.speculation is None:
        yield "drafts", "drafter", "none (plain decoding)"
        return
    yield "drafts", "drafter", served.speculation.drafter
    yield "drafts", "verifies", _verifies(served.speculation)
    listed = _listed(served.speculation)
    whole = served.target.vocab_size
    yield "drafts", "draft vocabulary", f"all {whole} tokens" if listed is None else f"{listed} of {whole} tokens"
    for warning in checked.drafter_warnings:
        yield "warning", "drafter", warning


def _verifies(speculation: Speculation) -> str:
    from sglang_auf.speculative.algorithm import verifies_trees

    block = speculation.block_size
    if not verifies_trees(speculation.device, speculation.is_mrope):
        return f"a chain of {block} tokens, {block - 1} of them drafted"
    if speculation.checked.card.head == "domino":
        return f"a chain of up to {block - 1} drafted tokens, as the load decides"
    if (nodes := tree_nodes()) is not None:
        return f"a tree of {nodes} drafted tokens"
    return f"a tree of up to {2 * block - 1} drafted tokens, as the load decides (block of {block})"


def _listed(speculation: Speculation | None) -> int | None:
    """Tokens of the draft vocabulary as served, None where all may be drafted."""
    vocabulary = speculation.checked.vocabulary if speculation and DRAFT_VOCABULARY.is_on() else None
    return None if vocabulary is None else len(vocabulary.tokens)


def _arguments(checked: Checked, api_key: str | None, here: bool) -> Iterator[Line]:
    view = checked.resolved
    names = dict.fromkeys((*sorted(checked.given), *DECIDED))
    unknown = set() if here else set(OF_THE_DEVICE) - checked.given.keys()
    if checked.profile.device == "cpu":
        unknown.add("mem_fraction_static")  # the platform plans the pool itself
    for name in names:
        value = getattr(view, name)
        if name == "api_key":
            value = None if api_key is None else "(given)"
        if value is not None and name not in unknown:
            yield "argument", name, str(value)


def _memory(checked: Checked, target: Path) -> Iterator[Line]:
    view, speculation = checked.resolved, checked.served.speculation
    drafter = None if speculation is None else speculation.checked.path
    on_cpu = checked.profile.device == "cpu"
    listed, hidden = _listed(speculation), checked.served.target.hidden_size
    rows = rows_of_head(listed, hidden, WEIGHT_COPIES if on_cpu else 1)
    if on_cpu:
        plan = on_a_cpu(target, drafter, rows, view.max_total_tokens)
    else:
        from sglang.srt.utils.common import get_device_memory_capacity

        plan = on_cuda(target, drafter, rows, int(get_device_memory_capacity("cuda") * 2**20), view)
    yield from _parts(plan)
    most = view.max_running_requests
    longest = view.context_length or checked.served.target.max_position_embeddings
    if plan.tokens is None:
        return
    bound = "" if most is None else f" (at most {most} run at once)"
    for length in LENGTHS:
        fit = f"{plan.requests(length, most)}{bound}"
        too_long = longest is not None and length > longest
        yield "requests", f"of {length} tokens", f"none: a context has {longest}" if too_long else fit
    shortest = min(LENGTHS[0], longest or LENGTHS[0])
    if not plan.requests(shortest, most):
        yield "warning", "memory", f"no request of {shortest} tokens fits: take more memory or a smaller target"


def _parts(plan: Plan) -> Iterator[Line]:
    times = "" if plan.copies == 1 else f", held {plan.copies} times"
    known = "not known before its files are fetched"
    weights = _gib(plan.copies * plan.target.weights) if plan.target.weights else known
    yield "memory", f"weights of the target{times}", weights
    if plan.drafter is not None:
        yield "memory", f"weights of the drafter{times}", _gib(plan.copies * plan.drafter.weights)
    if plan.head_rows:
        yield "memory", "rows of the head that may be drafted", _gib(plan.head_rows)
    yield "memory", "KV of a token, target", _kib(plan.target.kv_per_token)
    if plan.drafter is not None:
        yield "memory", "KV of a token, drafter", _kib(plan.drafter.kv_per_token)
    if plan.static is not None:
        yield "memory", "for weights and KV together", _gib(plan.static)
    yield "memory", "kept for all else", _gib(plan.reserved)
    yield "memory", "KV pool, tokens", known if plan.tokens is None else str(plan.tokens)
    if plan.tokens is not None:
        yield "memory", "KV pool, size", _gib(plan.tokens * plan.kv_per_token)


def _recording(checked: Checked, target: Path) -> Iterator[Line]:
    """Raises ConfigError for a directory that cannot be used. None is made."""
    directory = checked.profile.record.path
    if directory is None:
        return
    yield "records", "directory", f"{directory} ({RECORDING[look_at(directory, Manifest.of(target))]})"


def _notes(profile: Profile, here: bool) -> Iterator[Line]:
    if profile.device == "cpu":
        yield "note", "memory", "the head's rows are taken out of what is kept for all else"
        return
    yield "note", "memory", f"an estimate for a device on which nothing else runs; left out: {LEFT_OUT}"
    if not here:
        yield "note", "device", NOT_HERE


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _kib(size: int) -> str:
    return f"{size / 1024:.1f} KiB"

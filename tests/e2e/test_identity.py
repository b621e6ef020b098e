"""Greedy answers with speculation are the tokens of plain decoding, whatever the block, drafter, batch or cache."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import pytest

from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary, write
from sglang_auf.env import CPU_OVERLAP, TREE, TREE_NODES
from tests.support.engines import run_engine
from tests.support.tiny_models import write_drafter, write_target
from tests.support.toy_tokenizer import toy_tokenizer

pytestmark = pytest.mark.e2e

TOKENS = 64


def prompts(count: int, vocabulary: int = 64) -> list[list[int]]:
    """Of mixed lengths, some with a common prefix, one longer than a prefill chunk of 32."""
    generator = random.Random(7)
    shared = [generator.randrange(4, vocabulary) for _ in range(20)]
    made = []
    for number in range(count):
        own = [generator.randrange(4, vocabulary) for _ in range(generator.choice([1, 5, 17, 40, 90]))]
        made.append(shared + own if number % 3 == 0 else own)
    return made


GREEDY = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}


def job(inputs: list[list[int]], concurrency: int, **sampling: Any) -> dict[str, Any]:
    return {"inputs": inputs, "sampling": GREEDY | sampling, "concurrency": concurrency}


@pytest.fixture(scope="module")
def plain(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Plain decoding alone (concurrency 1) and in company."""
    inputs = prompts(24)
    engine = {"model_path": str(tiny_target), "context_length": 256}
    return run_engine(tmp_path_factory.mktemp("plain"), engine, [job(inputs, 1), job(inputs, 16)])


def tokens(results: list[dict[str, Any]]) -> list[list[int]]:
    return [result["ids"] for result in results]


def test_plain_decoding_does_not_depend_on_company(plain: Any) -> None:
    alone, together = plain
    assert tokens(alone) == tokens(together)


SMALL_POOL = {"max_total_tokens": 1024, "enable_mixed_chunk": True, "chunked_prefill_size": 64}


@pytest.mark.parametrize(
    ("block", "engine"),
    [
        (4, {}),
        (8, {"disable_radix_cache": True, "chunked_prefill_size": 32}),
        # A pool that cannot hold all requests at once: some are retracted and prefilled again.
        (8, SMALL_POOL),
        (8, SMALL_POOL | {"overlap": True}),
    ],
)
def test_auf_equals_plain_decoding(
    block: int,
    engine: dict[str, Any],
    plain: Any,
    tiny_target: Path,
    tiny_drafter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """overlap: under SGLang's overlap schedule, as on a GPU."""
    inputs = prompts(24)
    arguments = {
        "model_path": str(tiny_target),
        "context_length": 256,
        "speculative_algorithm": "AUF",
        "speculative_draft_model_path": str(tiny_drafter(block)),
    } | engine
    overlap = arguments.pop("overlap", False)
    environment = {
        CPU_OVERLAP.name: str(int(overlap)),
        # Plain decoding had one: the bits do not depend on their number. One engine with two is enough: they are slow.
        "OMP_NUM_THREADS": "2" if "disable_radix_cache" in engine else "1",
    }
    results = run_engine(tmp_path, arguments, [job(inputs, 1), job(inputs, 16)], **environment)
    for found in results:
        assert tokens(found) == tokens(plain[0])
        assert all(result["meta"]["spec_verify_ct"] > 0 for result in found)


@pytest.mark.parametrize("overlap", [False, True])
def test_long_blocks_end_with_the_context_as_plain_decoding_does(
    overlap: bool, tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    """A verify step takes slots for two blocks ahead, here 32, also where the context has fewer left.

    The second job finds out whether the engine is alive: when it idles, SGLang looks for slots that were lost.
    """
    inputs, engine = [prompt[:40] for prompt in prompts(12)], {"model_path": str(tiny_target), "context_length": 96}
    drafts = {"speculative_algorithm": "AUF", "speculative_draft_model_path": str(tiny_drafter(16))}
    whole = [job(inputs, 8, max_new_tokens=None), job(inputs, 1, max_new_tokens=None)]
    alone, _ = run_engine(tmp_path / "plain", engine, whole)
    drafted, again = run_engine(tmp_path / "auf", engine | drafts, whole, **{CPU_OVERLAP.name: str(int(overlap))})
    assert tokens(drafted) == tokens(again) == tokens(alone)
    assert all(len(prompt) + len(answer) >= 94 for prompt, answer in zip(inputs, tokens(alone), strict=True))


@pytest.mark.parametrize("overlap", [False, True])
def test_an_answer_that_fills_the_pool_ends_by_length(
    overlap: bool, tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    """SGLang counts on a slot for each token, and would abort a request that is alone when its last steps need more."""
    engine = {"model_path": str(tiny_target), "context_length": 256, "max_total_tokens": 256}
    drafts = {"speculative_algorithm": "AUF", "speculative_draft_model_path": str(tiny_drafter(16))}
    short, long = [5] * 20, [5] * 235
    jobs = [job([short, long], 1, max_new_tokens=None)]
    (alone,) = run_engine(tmp_path / "plain", engine, jobs)
    (drafted,) = run_engine(tmp_path / "auf", engine | drafts, jobs, **{CPU_OVERLAP.name: str(int(overlap))})
    for plain, auf in zip(alone, drafted, strict=True):
        assert auf["meta"]["finish_reason"]["type"] == plain["meta"]["finish_reason"]["type"] == "length"
        assert auf["ids"] == plain["ids"][: len(auf["ids"])]
    assert [len(auf["ids"]) for auf in drafted] == [256 - 20 - 32, 1]


@pytest.mark.parametrize("overlap", [False, True])
def test_turns_of_a_streaming_session_are_answered_as_by_plain_decoding(
    overlap: bool, tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    """Each turn begins behind an answer whose last token no forward has seen, at many places of a block."""
    engine = {"model_path": str(tiny_target), "context_length": 256, "enable_streaming_session": True}
    drafts = {"speculative_algorithm": "AUF", "speculative_draft_model_path": str(tiny_drafter(8))}
    turns = [prompt[:8] for prompt in prompts(16)]
    jobs = [
        job(turns, 1) | {"session": True, "sampling": [GREEDY | {"max_new_tokens": 1 + turn % 9} for turn in range(16)]}
    ]
    (alone,) = run_engine(tmp_path / "plain", engine, jobs)
    (drafted,) = run_engine(tmp_path / "auf", engine | drafts, jobs, **{CPU_OVERLAP.name: str(int(overlap))})
    assert tokens(drafted) == tokens(alone)
    # All tokens before the turn but the answer's last.
    for before, turn in pairwise(drafted):
        assert turn["meta"]["cached_tokens"] == before["meta"]["prompt_tokens"] + len(before["ids"]) - 1


def test_grammars_beside_prompts_are_followed_under_overlap(tmp_path: Path) -> None:
    """Each character allows others than the one before, so masks that are one step old would be seen."""
    target = write_target(tmp_path / "target", vocabulary=272)
    toy_tokenizer().save_pretrained(target)
    drafter = write_drafter(tmp_path / "drafter", 4, vocabulary=272)
    inputs = prompts(24)
    engine = {
        "model_path": str(target),
        "context_length": 256,
        "skip_tokenizer_init": False,
        "enable_mixed_chunk": True,
        "chunked_prefill_size": 32,
    }
    drafts = {"speculative_algorithm": "AUF", "speculative_draft_model_path": str(drafter)}
    jobs = [job(inputs, 6, max_new_tokens=24, regex="([ab][cd][ef]){40}")]
    (alone,) = run_engine(tmp_path / "plain", engine, jobs)
    (drafted,) = run_engine(tmp_path / "auf", engine | drafts, jobs, **{CPU_OVERLAP.name: "1"})
    assert tokens(drafted) == tokens(alone)


def test_a_request_for_no_token_is_answered_as_by_plain_decoding(
    tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    engine = {"model_path": str(tiny_target), "context_length": 256}
    drafts = {"speculative_algorithm": "AUF", "speculative_draft_model_path": str(tiny_drafter(4))}
    jobs = [job(prompts(3), 1, max_new_tokens=0) | {"logprobs": True, "top_logprobs": 2}]
    names = ("output_token_logprobs", "output_top_logprobs", "completion_tokens", "finish_reason")
    found = []
    for name, arguments in (("plain", engine), ("auf", engine | drafts)):
        (answers,) = run_engine(tmp_path / name, arguments, jobs)
        found.append([(answer["ids"], [answer["meta"].get(name) for name in names]) for answer in answers])
    assert found[0] == found[1]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "form",
    [{"bias": True}, {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}],
    ids=["biases", "scaled positions"],
)
def test_a_target_of_another_form_is_replayed_and_decoded_alike(
    form: dict[str, Any], tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    inputs, target = prompts(6), write_target(tmp_path / "target", **form)
    engine = {"model_path": str(target), "context_length": 256}
    drafts = {"speculative_algorithm": "AUF", "speculative_draft_model_path": str(tiny_drafter(4))}
    (alone,) = run_engine(tmp_path / "plain", engine, [job(inputs, 1)])
    (drafted,) = run_engine(tmp_path / "auf", engine | drafts, [job(inputs, 6)])
    assert tokens(drafted) == tokens(alone)
    for name in ("plain", "auf"):
        assert "is not replayed" not in (tmp_path / name / "log").read_text()


DOMINO = dict(projector_type="domino", shift_label=True, pure_draft_prefix_len=1, gru_hidden_dim=32, emb_dim=16)


def rows_of_steps(answers: list[dict[str, Any]]) -> list[int]:
    """[n]: steps that verified n rows of a request. Every step says how many it had."""
    counts = [answer["meta"]["spec_cap_lens_histogram"] for answer in answers]
    assert [sum(of_answer) for of_answer in counts] == [answer["meta"]["spec_verify_ct"] for answer in answers]
    return [sum(kind) for kind in zip_longest(*counts, fillvalue=0)]


@pytest.mark.parametrize("head", ["dflash", "domino"])
def test_trees_follow_the_load_and_change_no_answer(
    head: str, plain: Any, tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    """The drafter is nearly always wrong, so trees shrink; how far, the machine decides.

    Domino runs under SGLang's overlap schedule.
    """
    arguments = {
        "model_path": str(tiny_target),
        "context_length": 256,
        "speculative_algorithm": "AUF",
        "speculative_draft_model_path": str(tiny_drafter(8, **(DOMINO if head == "domino" else {}))),
    }
    inputs = prompts(24)
    environment = {CPU_OVERLAP.name: "1" if head == "domino" else "0"}
    together, few = run_engine(tmp_path, arguments, [job(inputs, 16), job(inputs, 2)], **environment)
    assert tokens(together) == tokens(few) == tokens(plain[0])
    rows = rows_of_steps(together)
    assert rows[1] > 0, "no step left its nodes out"
    assert sum(rows[2:]) > 0, "no step drafted"


@pytest.mark.parametrize("nodes", [3, 15])
def test_trees_of_any_size_change_no_answer(
    nodes: int, plain: Any, tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    """Of 64 tokens, trees of 15 nodes hold the target's often, in branches too, and accept what a chain would not."""
    arguments = {
        "model_path": str(tiny_target),
        "context_length": 256,
        "speculative_algorithm": "AUF",
        "speculative_draft_model_path": str(tiny_drafter(8)),
        # As in the third engine above, and chunks of prefill beside decoding.
        "max_total_tokens": 1024,
        "chunked_prefill_size": 64,
    }
    inputs = prompts(24)
    jobs = [job(inputs, 16), job(inputs, 1)]
    environment = {TREE_NODES: str(nodes), CPU_OVERLAP.name: "1" if nodes == 3 else "0"}
    found = run_engine(tmp_path, arguments, jobs, **environment)
    assert tokens(found[0]) == tokens(found[1]) == tokens(plain[0])
    alone = found[1]
    assert max(range(nodes + 2), key=rows_of_steps(alone).__getitem__) == nodes + 1
    emitted = sum(len(answer["ids"]) - 1 for answer in alone)
    steps = sum(answer["meta"]["spec_verify_ct"] for answer in alone)
    assert emitted > (1 + nodes / 200) * steps


def test_a_tree_of_one_path_is_the_chain(
    plain: Any, tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    """A Domino drafter has one path: the same tokens and the same histogram of accepted lengths."""
    arguments = {
        "model_path": str(tiny_target),
        "context_length": 256,
        "speculative_algorithm": "AUF",
        "speculative_draft_model_path": str(tiny_drafter(4, **DOMINO)),
    }
    inputs = prompts(8)
    (tree,) = run_engine(tmp_path / "tree", arguments, [job(inputs, 8)], **{TREE_NODES: "3"})
    (chain,) = run_engine(tmp_path / "chain", arguments, [job(inputs, 8)], **{TREE.name: "0"})
    assert tokens(tree) == tokens(chain) == tokens(plain[0])[:8]
    name = "spec_correct_drafts_histogram"
    assert [answer["meta"][name] for answer in tree] == [answer["meta"][name] for answer in chain]


def test_a_draft_vocabulary_changes_no_answer_and_is_kept_to(
    plain: Any, tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    """A list of every token gives the steps of no list; with three tokens next to nothing is accepted."""
    inputs = prompts(24)
    steps = []
    for number, listed in enumerate((None, range(64), (7, 9, 11))):
        drafter = tmp_path / f"drafter{number}"
        shutil.copytree(tiny_drafter(4), drafter)
        if listed is not None:
            write(DraftVocabulary(tokens=tuple(listed)), drafter)
        arguments = {
            "model_path": str(tiny_target),
            "context_length": 256,
            "speculative_algorithm": "AUF",
            "speculative_draft_model_path": str(drafter),
        }
        # A chain, whose steps do not depend on the time they take.
        (found,) = run_engine(tmp_path / f"run{number}", arguments, [job(inputs, 16)], **{TREE.name: "0"})
        assert tokens(found) == tokens(plain[0])
        steps.append([result["meta"]["spec_verify_ct"] for result in found])
    assert steps[0] == steps[1] != steps[2]


@pytest.mark.parametrize("pool", [0, 8])
def test_domino_equals_plain_decoding(
    pool: int, plain: Any, tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    """pool: candidates of the corrected slots; 0 is the full vocabulary."""
    drafter = tiny_drafter(4, **DOMINO)
    arguments = {
        "model_path": str(tiny_target),
        "context_length": 256,
        "speculative_algorithm": "AUF",
        "speculative_draft_model_path": str(drafter),
        "speculative_domino_candidate_pool_size": pool,
    }
    inputs = prompts(8)
    (found,) = run_engine(tmp_path, arguments, [job(inputs, 8)])
    assert tokens(found) == tokens(plain[0])[:8]
    assert all(result["meta"]["spec_verify_ct"] > 0 for result in found)


def test_auf_equals_the_built_in_dflash(tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path) -> None:
    """Same drafter, same tokens, and as a chain the same histogram of accepted lengths."""
    drafter, inputs, found = tiny_drafter(4), prompts(8), {}
    for algorithm in ("AUF", "DFLASH"):
        arguments = {
            "model_path": str(tiny_target),
            "context_length": 256,
            "speculative_algorithm": algorithm,
            "speculative_draft_model_path": str(drafter),
            "disable_overlap_schedule": True,
        }
        (found[algorithm],) = run_engine(tmp_path / algorithm, arguments, [job(inputs, 4)], **{TREE.name: "0"})
    for ours, theirs in zip(found["AUF"], found["DFLASH"], strict=True):
        assert ours["ids"] == theirs["ids"]
        assert ours["meta"]["spec_correct_drafts_histogram"] == theirs["meta"]["spec_correct_drafts_histogram"]


def test_a_seed_gives_the_answer_of_plain_decoding(
    tiny_target: Path, tiny_drafter: Callable[..., Path], tmp_path: Path
) -> None:
    """At temperature 1, alone and in company. Another seed gives another answer."""
    inputs = prompts(12)
    sampled = {"temperature": 1.0, "top_p": 0.95, "min_p": 0.02, "max_new_tokens": TOKENS, "ignore_eos": True}
    seeded = [sampled | {"sampling_seed": 1000 + number} for number in range(len(inputs))]
    other = [sampled | {"sampling_seed": 2000 + number} for number in range(len(inputs))]
    engine: dict[str, Any] = {"model_path": str(tiny_target), "context_length": 256}
    speculation = {"speculative_algorithm": "AUF", "speculative_draft_model_path": str(tiny_drafter(4))}

    def jobs(*samplings: Any) -> list[dict[str, Any]]:
        return [{"inputs": inputs, "sampling": s, "concurrency": c} for s, c in samplings]

    (reference,) = run_engine(tmp_path / "plain", engine, jobs((seeded, 1)))
    alone, together, differently = run_engine(
        tmp_path / "auf", engine | speculation, jobs((seeded, 1), (seeded, 12), (other, 12))
    )
    assert tokens(alone) == tokens(reference)
    assert tokens(together) == tokens(reference)
    assert tokens(differently) != tokens(reference)

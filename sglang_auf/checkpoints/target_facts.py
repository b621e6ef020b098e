"""What a drafter depends on in its target, as the target's files say it. No weights are read."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_auf.checkpoints.tappable import SCALED_EMBEDDINGS, tappable_layers
from sglang_auf.checkpoints.target_config import language_config, rope_theta
from sglang_auf.errors import TargetError
from sglang_auf.files import read_json

HUB_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """One target model.

    name: its hub id where the directory is a hub cache, else the directory's own name.
    hub_id, revision: None unless the directory is a hub cache. num_layers: transformer layers.
    config_hash: SHA-256 of `language_shape`. chat_template_hash: None without a template.
    max_position_embeddings: tokens, None where the config is silent. dtype: as the config spells it ("bfloat16").
    architecture: the class that SGLang serves it with, None where the config names none.
    """

    name: str
    hub_id: str | None
    revision: str | None
    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    config_hash: str
    chat_template_hash: str | None
    max_position_embeddings: int | None
    dtype: str | None
    architecture: str | None = None

    @classmethod
    def of(cls, target: Path) -> TargetFacts:
        """Read config.json and the chat template of a model directory. Raises TargetError."""
        config = read_json(target / "config.json", TargetError)
        text = language_config(config)
        hub_id, revision = _hub_identity(target)
        template = _chat_template(target)
        shape = language_shape(text, target)
        return cls(
            name=hub_id or target.resolve().name,
            hub_id=hub_id,
            revision=revision,
            model_type=shape["model_type"],
            hidden_size=shape["hidden_size"],
            num_layers=shape["num_hidden_layers"],
            vocab_size=shape["vocab_size"],
            config_hash=hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest(),
            chat_template_hash=None if template is None else chat_template_hash(template),
            max_position_embeddings=text.get("max_position_embeddings"),
            dtype=text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype"),
            architecture=next(iter(config.get("architectures") or ()), None),
        )

    @property
    def tappable_layers(self) -> int:
        """N, where a drafter may read the outputs of layers 0..N-1. Raises TargetError where SGLang can tap none."""
        return tappable_layers(self.architecture, self.num_layers)

    @property
    def embedding_scale(self) -> float:
        """What SGLang's embedding module multiplies each row by."""
        return math.sqrt(self.hidden_size) if self.architecture in SCALED_EMBEDDINGS else 1.0


def language_shape(config: Mapping[str, Any], target: Path) -> dict[str, Any]:
    """The shape of a language model, as far as a drafter that reads its hidden states needs it; config_hash hashes it.

    It has only fields that every writer of a checkpoint keeps (hub, GGUF, another version of transformers), in one
    normal form. Left out on purpose: max_position_embeddings and rope scaling (serving choices), norm epsilon (a GGUF
    keeps it as float32), tie_word_embeddings and architectures (not always written), dtype and quantisation.
    """
    heads = _require(config, "num_attention_heads", int, target)
    hidden = _require(config, "hidden_size", int, target)
    return {
        "model_type": _require(config, "model_type", str, target),
        "hidden_size": hidden,
        "num_hidden_layers": _require(config, "num_hidden_layers", int, target),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "intermediate_size": config.get("intermediate_size"),
        "vocab_size": _require(config, "vocab_size", int, target),
        "rope_theta": rope_theta(config),
    }


def chat_template_hash(template: str) -> str:
    r"""SHA-256 of a chat template. A Jinja string may hold a newline (GGUF) or \n (hub), which are made equal."""
    return hashlib.sha256(template.replace("\\n", "\n").replace("\r\n", "\n").strip().encode()).hexdigest()


def tokenizer_hash(target: Path) -> str | None:
    """SHA-256 of which id is which token, however tokenizer.json is written; None without that file.

    Raises TargetError.
    """
    file = target / "tokenizer.json"
    if not file.is_file():
        return None
    content = read_json(file, TargetError)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [token, score] by id
        vocabulary = {entry[0]: id for id, entry in enumerate(vocabulary)}
    ids = {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}
    return hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()


def _chat_template(target: Path) -> str | None:
    """The default chat template, from the first of the files in which transformers looks for it."""
    file = target / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (target / name).is_file():
            template = read_json(target / name, TargetError).get("chat_template")
            if isinstance(template, list):  # several named templates
                template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
            if isinstance(template, str):
                return template
    return None


def _hub_identity(target: Path) -> tuple[str | None, str | None]:
    """(hub id, revision) of a directory in a hub cache: .../models--owner--name/snapshots/<revision>."""
    parts = target.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots":
        return None, None
    match = HUB_CACHE.fullmatch(parts[-3])
    return (f"{match['owner']}/{match['name']}", parts[-1]) if match else (None, None)


def _require(config: Mapping[str, Any], key: str, kind: type, target: Path) -> Any:
    value = config.get(key)
    if not isinstance(value, kind):
        raise TargetError(
            f"{target / 'config.json'} has {key} = {value!r}",
            f"the config.json of a causal language model, with {key} of type {kind.__name__}",
            "give the directory of the target model, not of an adapter or a drafter",
        )
    return value

"""Check that a drafter checkpoint holds exactly the weights that SGLang's DFlash model reads.

SGLang 0.5.23 (models/dflash.py, load_weights) skips every name it does not know and leaves every weight it does not
find uninitialised, so a wrong checkpoint serves at tau 1 without a word. Here both are errors, found from the
safetensors headers before anything is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from sglang_auf.checkpoints.drafter_settings import check_kind, draft_setting, head_of
from sglang_auf.errors import CardError
from sglang_auf.files import weight_files
from sglang_auf.provenance import sha256_of

Shape = tuple[int, ...]

FLOATS = ("BF16", "F16", "F32")

# Names in the vendor's own export, and what SGLang reads them as.
ALIASES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
# SGLang computes rotary tables itself; old exports carry them as weights.
RECOMPUTED = "rotary_emb.inv_freq"
# A DFlash drafter embeds and scores with the target's own tables; SGLang never reads a copy.
BORROWED = ("embed_tokens.weight", "lm_head.weight")


class Tensor(NamedTuple):
    """One entry of a safetensors header. name: as the file spells it."""

    name: str
    shape: Shape
    dtype: str
    file: Path


def tapped_layers(config: Mapping[str, Any]) -> list[int] | None:
    """0-based target layers whose outputs the drafter reads; None where they follow from the target's depth alone.

    SGLang returns the outputs sorted by layer and without repetition, so an unsorted or repeated list is an error.
    """
    ids = draft_setting(config, "target_layer_ids")
    depth = draft_setting(config, "num_target_layers")
    if ids is None and depth is None:
        return None
    if ids is None:
        depth = config_size({"num_target_layers": depth}, "num_target_layers")
        ids = default_target_layer_ids(depth, config_size(config, "num_hidden_layers"))
    if not isinstance(ids, list) or not ids or not all(type(layer) is int for layer in ids) or ids != sorted(set(ids)):
        raise CardError(
            f"tapped layers {ids!r} from config.json",
            "target_layer_ids as a list of 0-based layer numbers, each larger than the one before",
            "export the drafter with its taps in layer order (the columns of fc.weight follow that order)",
        )
    return ids


def default_target_layer_ids(target_layers: int, draft_layers: int) -> list[int]:
    """The taps SGLang and z-lab choose: as many as draft layers, evenly from the 2nd layer to the 3rd last."""
    if draft_layers == 1:
        return [target_layers // 2]
    step = (target_layers - 4) / (draft_layers - 1)
    return [round(1 + index * step) for index in range(draft_layers)]


def expected_weights(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes a checkpoint of this drafter config must hold, as z-lab and SpecForge write them.

    Shapes are [out, in]. Raises CardError for a config that is not a plain DFlash or Domino drafter, or lacks a size.
    """
    check_kind(config)
    hidden = config_size(config, "hidden_size")
    inner = config_size(config, "intermediate_size")
    head_dim = config_size(config, "head_dim")
    queries = config_size(config, "num_attention_heads") * head_dim
    keys = config_size(config, "num_key_value_heads") * head_dim
    layers = config_size(config, "num_hidden_layers")
    tapped = tapped_layers(config)
    taps = layers if tapped is None else len(tapped)  # SGLang's own choice has as many taps as the drafter has layers

    weights: dict[str, Shape] = {
        "fc.weight": (hidden, taps * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.get("attention_bias"):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer[f"self_attn.{name}.bias"] = layer[f"self_attn.{name}.weight"][:1]
    for index in range(layers):
        weights |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    if head_of(config) == "domino":
        weights |= _domino_weights(config, hidden)
    return weights


def check_weights(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Compare the checkpoint in directory `path` with `expected_weights`, from headers only.

    Returns warnings. Raises CardError for unknown, missing, doubled, misshapen or non-float weights, missing shards,
    truncated files, and checkpoints that are pickles (loading one may run any code, so none is ever opened).
    """
    expected = expected_weights(config)
    found: dict[str, Tensor] = {}
    doubled: list[str] = []
    borrowed: list[str] = []
    for tensor in _stored(path):
        name = tensor.name.removeprefix("model.")
        name = ALIASES.get(name, name)
        if name.endswith(RECOMPUTED):
            continue
        if name in BORROWED and tensor.shape == (config_size(config, "vocab_size"), config_size(config, "hidden_size")):
            borrowed.append(tensor.name)
            continue
        if name in found:
            doubled.append(f"{tensor.name} in {found[name].file.name} and {tensor.file.name}")
        found[name] = tensor

    shared = [name for name in expected if name in found]
    complaints = [
        *_some("missing", [name for name in expected if name not in found]),
        *_some("unknown", [tensor.name for name, tensor in found.items() if name not in expected]),
        *_some("doubled", doubled),
        *_some(
            "misshapen",
            [
                f"{name} {list(found[name].shape)} instead of {list(expected[name])}"
                for name in shared
                if found[name].shape != expected[name]
            ],
        ),
        *_some("not float", [f"{name} {found[name].dtype}" for name in shared if found[name].dtype not in FLOATS]),
    ]
    if complaints:
        raise CardError(
            f"{path}: " + "; ".join(complaints),
            f"exactly the {len(expected)} weights of a {head_of(config)} drafter with "
            f"{config['num_hidden_layers']} layers of width {config['hidden_size']}, as {'/'.join(FLOATS)}",
            "export the drafter again, or correct its config.json; SGLang would skip or make up weights in silence",
        )
    return [
        f"{name} in the drafter is not read: drafts use the target's own table. If it was trained, tau is lower"
        for name in borrowed
    ]


def check_finite(path: Path) -> None:
    """Read all weights. Raises CardError for one that holds a value which is no finite number, or cannot be read."""
    for file in weight_files(path, CardError):
        try:
            with safe_open(file, framework="pt") as opened:
                broken = [name for name in list(opened.keys()) if not opened.get_tensor(name).isfinite().all()]
        except (SafetensorError, OSError) as problem:
            raise CardError(f"{file} cannot be read ({problem})", "a complete safetensors file") from problem
        if broken:
            raise CardError(
                f"{file}: {'; '.join(_some('with infinite values or NaN', broken))}",
                "weights that are finite numbers",
                "export a checkpoint from before the training run diverged",
            )


def weights_sha256(path: Path) -> str:
    """The SHA-256 that tells the weights in directory `path` from others; reads all of them.

    One file's own digest, or that of the digests of several, in order. Raises CardError where there is no weight file,
    OSError where one cannot be read.
    """
    hashes = sorted(sha256_of(weight_files(path, CardError)).values())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def config_size(config: Mapping[str, Any], key: str) -> int:
    """A positive integer that config.json must give, since SGLang would fill in its model class's default."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CardError(f"{key} {value!r} in config.json", f"{key} as a positive integer")
    return value


def _domino_weights(config: Mapping[str, Any], hidden: int) -> dict[str, Shape]:
    """The GRU over the drafted tokens and the low-rank correction of the logits (arXiv 2605.29707)."""
    shift_label, prefix = draft_setting(config, "shift_label"), draft_setting(config, "pure_draft_prefix_len")
    if not isinstance(shift_label, bool) or prefix != 1:
        raise CardError(
            f"a Domino drafter with shift_label {shift_label!r} and pure_draft_prefix_len {prefix!r}",
            "shift_label true or false, and pure_draft_prefix_len 1: SGLang serves no other",
            "set them in dflash_config as the drafter was trained; another prefix length needs training again",
        )
    settings = {**config, **(config.get("dflash_config") or {})}
    state, rank = config_size(settings, "gru_hidden_dim"), config_size(settings, "emb_dim")
    vocab = config_size(config, "vocab_size")
    if config.get("emb_dim", rank) != rank:
        raise CardError(
            f"emb_dim {rank} in dflash_config and {config['emb_dim']} at the top level of config.json",
            "the same emb_dim in both",
        )
    return {
        "prefix_gru.weight_ih_l0": (3 * state, hidden),
        "prefix_gru.weight_hh_l0": (3 * state, state),
        "embed_proj.0.weight": (rank, hidden + state),
        "embed_proj.2.weight": (vocab, rank),
    }


def _stored(path: Path) -> Iterable[Tensor]:
    """The headers of every safetensors file that SGLang would read."""
    for file in weight_files(path, CardError):
        yield from _header(file)


def _header(file: Path) -> list[Tensor]:
    try:
        with safe_open(file, framework="numpy") as opened:  # checks that the file is as long as its header says
            names = opened.keys()
            entries = [opened.get_slice(name) for name in names]
            return [
                Tensor(name, tuple(entry.get_shape()), entry.get_dtype(), file)
                for name, entry in zip(names, entries, strict=True)
            ]
    except (SafetensorError, OSError) as problem:
        raise CardError(
            f"{file} ({file.stat().st_size:,} bytes) is truncated or no safetensors file ({problem})",
            "a complete safetensors file",
            "fetch the drafter again (a file of about 130 bytes is a git-lfs pointer: run git lfs pull)",
        ) from problem


def _some(kind: str, names: list[str], shown: int = 3) -> list[str]:
    """["5 missing: a, b, c, ..."], or [] when there are none."""
    more = ", ..." if len(names) > shown else ""
    return [f"{len(names)} {kind}: {', '.join(names[:shown])}{more}"] if names else []

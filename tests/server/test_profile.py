"""Profiles: what is read, what is overridden, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.profile import PROFILES, default_profile, load_profile, profile_names
from sglang_auf.errors import ConfigError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(
        "target: owner/target\n"
        "drafter: owner/drafter\n"
        "drafter_notice: not yours\n"
        "device: cpu\n"
        "served_model_name: small\n"
        "server_args: {max_running_requests: 4}\n"
    )
    return tmp_path


def test_every_shipped_profile_is_valid() -> None:
    assert {"qwen3-8b", "smollm2-135m"} <= set(profile_names())
    for name in profile_names():
        profile = load_profile(name)
        assert profile.host == "127.0.0.1", "a server must not be reachable from outside unless told"
        assert profile.server_args["enable_metrics"] is True, "acceptance is to be seen on /metrics"


def test_shipped_profiles_say_what_the_design_asks() -> None:
    qwen, small = load_profile("qwen3-8b"), load_profile("smollm2-135m")
    assert (qwen.device, qwen.dtype, qwen.thinking) == ("cuda", "bfloat16", "off")
    assert "attention_backend" not in qwen.server_args, "SGLang knows the fastest for the device"
    assert qwen.server_args["sampling_backend"] == "auf", "--plain draws by the same rule"
    assert qwen.drafter == "z-lab/Qwen3-8B-DFlash-b16"
    assert qwen.drafter_notice is not None
    assert (small.device, small.target, small.thinking) == ("cpu", "smollm2-135m", None)


def test_nothing_is_recorded_unless_a_directory_is_named(directory: Path) -> None:
    assert load_profile("small", directory=directory).record.directory is None
    record = load_profile("small", ["record.directory=rows", "record.share=0.1"], directory=directory).record
    assert (record.directory, record.share, record.opt_in) == ("rows", 0.1, False)
    for wrong, says in (("share=1.5", r"record\.share"), ("max_age=0", r"record\.max_age"), ("dir=x", "record.dir")):
        with pytest.raises(ConfigError, match=says):
            load_profile("small", [f"record.{wrong}"], directory=directory)


def test_own_drafter_ends_the_notice() -> None:
    profile = load_profile("qwen3-8b", ["drafter=/my/drafter"])
    assert (profile.drafter, profile.drafter_notice) == ("/my/drafter", None)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_revision_belongs_to_the_drafter_that_is_given_with_it(swapped: bool, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "target: owner/target\ndrafter: owner/one\ndrafter_revision: a1\ndevice: cpu\nserved_model_name: m\n"
    )
    given = ["drafter=owner/two", "drafter_revision=b2"]
    profile = load_profile("p", given[::-1] if swapped else given, directory=tmp_path)
    assert (profile.drafter, profile.drafter_revision) == ("owner/two", "b2")
    assert load_profile("p", given[:1], directory=tmp_path).drafter_revision is None
    assert load_profile("p", directory=tmp_path).drafter_revision == "a1"


def test_nodes_of_a_tree_are_refused_where_none_is_verified(directory: Path) -> None:
    with pytest.raises(ConfigError, match="tree_nodes on cuda"):
        load_profile("small", ["device=cuda", "tree_nodes=6"], directory=directory)


def test_overrides_are_yaml_values(directory: Path) -> None:
    profile = load_profile(
        "small",
        ["block_size=8", "thinking=off", "server_args.context_length=2048", "server_args.disable_radix_cache=true"],
        directory=directory,
    )
    assert profile.block_size == 8
    assert profile.thinking == "off", "YAML reads a bare off as false"
    assert profile.server_args == {"max_running_requests": 4, "context_length": 2048, "disable_radix_cache": True}
    assert load_profile("small", ["drafter=null"], directory=directory).drafter is None
    trees = load_profile("small", ["tree=false", "tree_nodes=6"], directory=directory)
    assert (profile.tree, profile.tree_nodes, trees.tree, trees.tree_nodes) == (True, None, False, 6)


def test_value_may_hold_equals_signs_and_colons(directory: Path) -> None:
    assert load_profile("small", ["target=/models/a=b:c"], directory=directory).target == "/models/a=b:c"


def test_flags_win_over_overrides_and_are_checked(directory: Path) -> None:
    profile = load_profile("small", ["port=1"], {"port": 2, "host": "::"}, directory)
    assert (profile.port, profile.host) == (2, "::")
    with pytest.raises(ConfigError, match="port"):
        load_profile("small", [], {"port": 70000}, directory)


def test_local_models_of_a_profile_count_from_the_checkout(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "owner" / "drafter").mkdir(parents=True)
    monkeypatch.setattr("server.profile.CHECKOUT", checkout)
    monkeypatch.chdir("/")
    profile = load_profile("small", directory=directory)
    assert profile.drafter == str(checkout / "owner" / "drafter")
    assert profile.target == "owner/target", "what is no directory stays a hub id"


def test_unknown_profile_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="nonsense") as caught:
        load_profile("nonsense")
    assert "qwen3-8b" in caught.value.expected
    assert "smollm2-135m" in caught.value.expected


@pytest.mark.parametrize("name", ["../profiles/qwen3-8b", str(PROFILES / "qwen3-8b"), ""])
def test_profile_is_a_name_and_not_a_path(name: str) -> None:
    with pytest.raises(ConfigError):
        load_profile(name)


def test_unknown_key_is_named_with_the_nearest(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key block_sise \(did you mean block_size\?\)"):
        load_profile("small", ["block_sise=8"], directory=directory)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("block_size=large", "block_size"),
        ("block_size=1", "block_size"),
        ("tree=12", "tree"),
        ("tree_nodes=0", "tree_nodes"),
        ("adaptive_block=true", "adaptive_block"),
        ("port=0", "port"),
        ("device=tpu", "device"),
        ("target=null", "target"),
        ("server_args=4", "server_args"),
        ("thinking=maybe", "thinking"),
        ("dtype=int8", "dtype"),
        ("target.name=4", "target is a single value"),
        ("no-equals-sign", "no-equals-sign"),
        ("=4", "=4"),
        ("server_args.=4", "server_args.=4"),
        ("port=[1", "not YAML"),
    ],
)
def test_bad_override_is_refused_by_name(override: str, said: str, directory: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("small", [override], directory=directory)
    assert said in caught.value.found


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "a: [1\n"])
def test_broken_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_profile("broken", directory=tmp_path)


@pytest.mark.parametrize(("cuda", "name"), [(True, "qwen3-8b"), (False, "smollm2-135m")])
def test_default_follows_the_machine(cuda: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert default_profile() == name

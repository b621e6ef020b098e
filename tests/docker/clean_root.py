"""python -m tests.docker.clean_root TARGET DIRECTORY: run an image's install and start steps without Docker.

This builds a target of docker/Dockerfile by the file's own RUN, COPY and ENV lines, in a clean Debian or Ubuntu root
that debootstrap makes, so that a missing system package shows. `--start` then runs its ENTRYPOINT and CMD as its USER,
as process 1 and with Docker's 64 MB of /dev/shm, until its HEALTHCHECK passes, asks one question, and sends its
STOPSIGNAL. Needs root, debootstrap, and about 13 GB in DIRECTORY, which the user deletes.

It is not an image: the base is debootstrap's and not the one that FROM names (in place of CUDA_IMAGE it has no CUDA),
and there are no layers, networks or kernel limits as Docker has them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.docker.dockerfile import DOCKERFILE, Copy, Instruction, Stage, chain, parse

CHECKOUT = DOCKERFILE.parent.parent
START_SECONDS = 900
STOP_SECONDS = 60

SUITES = {
    r"debian:bookworm-.*": ("bookworm", "http://deb.debian.org/debian", "main", "sid"),
    r"nvidia/cuda:.*-ubuntu24\.04": ("noble", "http://archive.ubuntu.com/ubuntu", "main,universe", "gutsy"),
}
"""Pattern of a base image -> what debootstrap makes its like from: suite, mirror, components, script.

The script is one that serves a family of suites, since debootstrap may be older than the suite."""


class Root:
    """A directory that stands for the image, and what its instructions have set so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.directory = "/"
        self.user = "0:0"

    def inside(self, place: str) -> Path:
        return self.path / os.path.join(self.directory, place).lstrip("/")

    def _home(self) -> str:
        """As Docker sets it: from the image's /etc/passwd, by number."""
        accounts = [line.split(":") for line in (self.path / "etc/passwd").read_text().splitlines()]
        return next((account[5] for account in accounts if account[2] == self.user.split(":")[0]), "/")

    def command(self, words: Sequence[str]) -> list[str]:
        """A host command that runs `words` in the root as process 1, in mounts that end with it."""
        root = shlex.quote(str(self.path))
        environment = {"HOME": self._home()} | self.environment
        mounts = [
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /sys {root}/sys",
            f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs -o size=64m tmpfs {root}/dev/shm",
        ]
        enter = ["chroot", f"--userspec={self.user}", str(self.path), "env", "-i"]
        enter += [f"{key}={value}" for key, value in environment.items()]
        enter += ["sh", "-c", 'cd "$0" && exec "$@"', self.directory, *words]
        script = " && ".join([*mounts, f"exec {shlex.join(enter)}"])
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]


def build(stages: Mapping[str, Stage], target: str, work: Path, overlay: Path | None) -> Root:
    """Run every instruction of the target and of the stages it copies from. CalledProcessError where one fails."""
    base, instructions = chain(stages, target)
    others = {copy.stage for copy in copies(instructions) if copy.stage}
    built = {name: build(stages, name, work, overlay) for name in sorted(others)}
    root = Root(work / target)
    _bootstrap(base, root.path, overlay)
    for instruction in instructions:
        _apply(instruction, root, built)
    return root


def copies(instructions: Sequence[Instruction]) -> list[Copy]:
    return [Copy.of(instruction) for instruction in instructions if instruction.name == "COPY"]


def _bootstrap(image: str, path: Path, overlay: Path | None) -> None:
    known = [made_from for pattern, made_from in SUITES.items() if re.fullmatch(pattern, image)]
    if not known:
        raise ValueError(f"base image {image}: no Debian or Ubuntu suite is known for it; add it to SUITES")
    suite, mirror, components, script = known[0]
    scripts = Path("/usr/share/debootstrap/scripts")
    _say(f"{path.name}: {suite} in place of {image}")
    subprocess.run(
        [
            "debootstrap",
            "--variant=minbase",
            f"--components={components}",
            suite,
            str(path),
            mirror,
            str(scripts / script),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for name in ("resolv.conf", "hosts"):  # Docker mounts these over the image's own
        shutil.copy(f"/etc/{name}", path / "etc" / name)
    if overlay is not None:
        shutil.copytree(overlay, path, dirs_exist_ok=True)


def _apply(instruction: Instruction, root: Root, built: Mapping[str, Root]) -> None:
    match instruction.name:
        case "ENV":
            root.environment |= dict(word.split("=", 1) for word in instruction.words)
        case "WORKDIR":
            root.directory = instruction.text
            root.inside(".").mkdir(parents=True, exist_ok=True)
        case "USER":
            root.user = instruction.text
        case "COPY":
            _copy(Copy.of(instruction), root, built)
        case "RUN":
            _say(f"{root.path.name}: RUN {instruction.text[:100]}")
            start = time.monotonic()
            subprocess.run(root.command(["/bin/sh", "-c", instruction.text]), check=True)
            _say(f"{root.path.name}: {time.monotonic() - start:.0f} s")


def _copy(copy: Copy, root: Root, built: Mapping[str, Root]) -> None:
    """Copies the content of a directory, or a file, which keeps its name when the destination ends with a slash."""
    for source in copy.sources:
        origin = built[copy.stage].inside(source) if copy.stage else CHECKOUT / source
        destination = root.inside(copy.destination)
        if origin.is_dir():
            shutil.copytree(origin, destination, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            into = destination / origin.name if copy.destination.endswith("/") else destination
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, into)


def start(root: Root, instructions: Sequence[Instruction]) -> dict[str, object]:
    """Run the image's process until it is healthy, ask it once and stop it.

    Returns ask()'s answer with `exit_code`, the exit code after STOPSIGNAL. Raises RuntimeError when it never gets
    healthy.
    """
    last = {instruction.name: instruction for instruction in instructions}  # a later one replaces an earlier
    health = Instruction("CMD", last["HEALTHCHECK"].text.partition("CMD ")[2]).words
    command = root.command(last["ENTRYPOINT"].words + last["CMD"].words)
    _say(f"{root.path.name}: {shlex.join(last['ENTRYPOINT'].words + last['CMD'].words)} as {root.user}")
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(root.command(health), stderr=subprocess.DEVNULL).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"never healthy (exit code {process.poll()}); look above for its error")
            time.sleep(2)
        _say(f"{root.path.name}: healthy")
        answer = ask(f"http://127.0.0.1:{last['EXPOSE'].text}")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), getattr(signal, last["STOPSIGNAL"].text))
        return answer | {"exit_code": process.wait(STOP_SECONDS)}
    finally:
        process.kill()


def ask(url: str) -> dict[str, object]:
    """One chat answer: its text and its tau."""
    with urllib.request.urlopen(f"{url}/v1/models") as reply:
        model = json.load(reply)["data"][0]["id"]
    question = {"model": model, "messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 32}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        answer = json.load(reply)
    return {
        "text": answer["choices"][0]["message"]["content"],
        "tau": answer["sglext"]["spec_tokens_details"]["tau"],
    }


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="An image's install and start steps in a clean root, without Docker.")
    parser.add_argument("target", help="a stage of docker/Dockerfile: cpu, cuda, train")
    parser.add_argument("directory", type=Path, help="an empty or absent directory for the roots")
    parser.add_argument("--start", action="store_true", help="run the image's process, ask it once, stop it")
    parser.add_argument(
        "--overlay", type=Path, help="copied over each new root: what your network needs (pip.conf, CA)"
    )
    options = parser.parse_args()
    if options.directory.exists() and any(options.directory.iterdir()):
        parser.error(f"{options.directory} is not empty; give an empty or absent directory")
    options.directory.mkdir(parents=True, exist_ok=True)
    stages = parse(DOCKERFILE.read_text())
    root = build(stages, options.target, options.directory.resolve(), options.overlay)
    size = subprocess.run(["du", "-sm", str(root.path)], capture_output=True, text=True, check=True).stdout.split()[0]
    _say(f"{root.path.name}: installed, {size} MB")
    if options.start:
        result = start(root, chain(stages, options.target)[1])
        _say(json.dumps(result))
        return 0 if result["exit_code"] == 0 and result["tau"] is not None else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

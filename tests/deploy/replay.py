"""Replay a Dockerfile without an engine: each stage an overlay over this machine's own root.

What is as in an engine: the order of the steps, the build context that .dockerignore lets through,
paths, users, variables, layers, a read-only root, volumes, and the entry point as process 1 of a
PID namespace. What is not: the base image. Its place is taken by this machine's root, its Python by
a local one. Needs root, and Linux that lets root mount overlays.

The instructions of our Dockerfile are known; others are refused, so that none is passed over.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_READ = """
import json, sys
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
ignored = open(".dockerignore").read().splitlines()
ignored = [line for line in ignored if line and not line.startswith("#")]
steps = DockerfileParser("Dockerfile").structure
json.dump({
    "steps": [[step["instruction"], step["value"]] for step in steps],
    "context": sorted(exclude_paths(".", ignored)),
}, sys.stdout)
"""
_NOTHING_TO_DO = ("COMMENT", "EXPOSE", "LABEL")


def unavailable() -> str | None:
    """Return why nothing can be replayed here, or None."""
    for tool in ("unshare", "setpriv", "chroot", "mount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if os.geteuid():
        return "only root may mount overlays"
    return None


@dataclass
class Stage:
    """One stage: what its steps and those of its parents wrote (`upper`), and its settings."""

    upper: Path
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    volumes: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    stopsignal: str = "SIGTERM"

    def mount(self, at: Path) -> list[str]:
        """Return the shell lines that mount it."""
        work = self.upper.parent / "work"
        options = f"lowerdir=/,upperdir={self.upper},workdir={work}"
        return [
            f"mkdir -p {work} {at}",
            f"mount -t overlay overlay -o {options} {at}",
            f"mount -t proc proc {at}/proc",
            f"mount --rbind /dev {at}/dev",
        ]

    def path(self, inside: str) -> Path:
        """Return where a file or directory is that a step wrote."""
        return self.upper / inside.lstrip("/")


class Replay:
    """The stages of `root`/Dockerfile, built in `scratch` as they are needed.

    Args:
        parser: a Python that has dockerfile-parse and docker.
        cache: a directory for the mounts of type cache.
    """

    def __init__(self, root: Path, scratch: Path, parser: Path, cache: Path) -> None:
        self._root, self._scratch, self._cache = root, scratch, cache
        read = subprocess.run(
            [parser, "-c", _READ], cwd=root, check=True, capture_output=True, text=True
        )
        found = json.loads(read.stdout)
        self._steps: dict[str, list[tuple[str, str]]] = {}
        base_image = ""
        for instruction, value in found["steps"]:
            if instruction == "FROM":
                parent, _, name = value.partition(" AS ")
                base_image = base_image or parent
                self._steps[name] = []
            if self._steps:
                self._steps[name].append((instruction, value))
        self.default = name
        self._python = _python_like(base_image).resolve()
        self._bin = self._python.parent
        self._stages: dict[str, Stage] = {}
        # What the engine is sent.
        self.context = scratch / "context"
        for path in map(Path, found["context"]):
            if (root / path).is_file():
                (self.context / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / path, self.context / path)

    def stage(self, name: str) -> Stage:
        """Return a stage, building it and those it needs first."""
        if name not in self._stages:
            self._stages[name] = self._build(name)
        return self._stages[name]

    def _build(self, name: str) -> Stage:
        steps = self._steps[name]
        parent = steps[0][1].partition(" AS ")[0]
        directory = self._scratch / name
        directory.mkdir()
        if parent in self._steps:
            below = self.stage(parent)
            stage = copy.deepcopy(below)
            if len(steps) > 1:
                # A copy: overlays take no layer that lies within another, as ours all do within /.
                stage.upper = directory / "upper"
                subprocess.run(["cp", "-a", below.upper, stage.upper], check=True)
        else:
            stage = self._base(directory)
        for instruction, value in steps[1:]:
            self._step(stage, directory, instruction, value)
        return stage

    def _base(self, directory: Path) -> Stage:
        """Stand in for the base image: this machine, with the Python and without our checkout."""
        stage = Stage(directory / "upper")
        # Unlike an image, a machine may keep its Python where others may not look.
        for folder in reversed(self._bin.parents[:-1]):
            (stage.upper / str(folder).lstrip("/")).mkdir(mode=0o755, parents=True)
        inside = stage.upper / str(self._bin).lstrip("/")
        inside.mkdir(mode=0o755)
        if not (self._bin / "python").exists():
            (inside / "python").symlink_to(self._python)
        return stage

    def _step(self, stage: Stage, directory: Path, instruction: str, value: str) -> None:
        if instruction in _NOTHING_TO_DO:
            return
        # Where the base image has its Python; a link there would not find its library.
        value = value.replace("/usr/local/bin", str(self._bin))
        words = shlex.split(value)
        if instruction == "ENV":
            stage.env |= dict(word.split("=", 1) for word in words)
        elif instruction == "WORKDIR":
            stage.workdir = value
            (stage.upper / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction in ("USER", "STOPSIGNAL"):
            setattr(stage, instruction.lower(), value)
        elif instruction in ("ENTRYPOINT", "CMD"):
            setattr(stage, instruction.lower(), json.loads(value))
        elif instruction == "VOLUME":
            stage.volumes = json.loads(value)
        elif instruction == "HEALTHCHECK":
            stage.healthcheck = json.loads(value[value.index("CMD") + 3 :])
        elif instruction == "COPY":
            self._copy(stage, directory, words)
        elif instruction == "RUN":
            self._run(stage, directory, value)
        else:
            raise NotImplementedError(f"the replay does not know {instruction} {value}")

    def _copy(self, stage: Stage, directory: Path, words: list[str]) -> None:
        lines = stage.mount(directory / "root")
        source = self.context
        if words[0].startswith("--from="):
            source = directory / "source"
            lines += self.stage(words.pop(0).removeprefix("--from=")).mount(source)
        assert not words[0].startswith("--"), f"the replay does not know COPY {words[0]}"
        *froms, to = words
        to = os.path.join(stage.workdir, to)
        target = f"{directory}/root{to}"  # all of ours are directories
        lines.append(f"mkdir -p {target}")
        for name in froms:
            at = source / name.lstrip("/")
            # Of a directory, what is in it is copied.
            lines.append(
                f"if [ -d {at} ]; then cp -a {at}/. {target}; else cp -a {at} {target}; fi"
            )
        _namespace(lines)

    def _run(self, stage: Stage, directory: Path, value: str) -> None:
        root = directory / "root"
        lines = stage.mount(root)
        # Our checkout must not be what a step reads.
        lines.append(f"mount -t tmpfs none {root}{self._root}")
        while value.startswith("--mount="):
            mount, value = value.split(maxsplit=1)
            options = dict(word.split("=") for word in mount.removeprefix("--mount=").split(","))
            assert options.pop("type") == "cache", mount
            kept = self._cache / options["target"].strip("/").replace("/", "_")
            target = f"{root}{options['target']}"
            kept.mkdir(parents=True, exist_ok=True)
            lines += [f"mkdir -p {target}", f"mount --bind {kept} {target}"]
        command = ["env", "-i", f"--chdir={stage.workdir}", *_assignments(stage.env)]
        _namespace([*lines, shlex.join(["chroot", str(root), *command, "sh", "-ec", value])])

    def container(
        self,
        stage: Stage,
        env: Mapping[str, str],
        mounts: Mapping[str, Path],
        volumes: Mapping[str, Path],
        log: Path,
        command: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a stage's entry point, or `command`, as with ``--read-only``; return `unshare`.

        `mounts` are read only; the `volumes` are directories of the stage's user. Process 1 is the
        only child of what is returned.
        """
        root = self._scratch / "container"
        lines = stage.mount(root)
        for target in (*mounts, *volumes):
            lines.append(f"mkdir -p {root}{target}")
        lines.append(f"mount -o remount,ro,bind {root}")
        lines.append(f"mount -t tmpfs -o ro none {root}{self._root}")
        for target, source in mounts.items():
            lines.append(f"mount --bind {source} {root}{target}")
            lines.append(f"mount -o remount,ro,bind {root}{target}")
        uid, gid = map(int, stage.user.split(":"))
        for target, source in volumes.items():
            source.mkdir(parents=True, exist_ok=True)
            os.chown(source, uid, gid)
            lines.append(f"mount --bind {source} {root}{target}")
        user = [f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
        start = ["chroot", str(root), "setpriv", *user, "--bounding-set=-all"]
        start += ["env", "-i", f"--chdir={stage.workdir}", *_assignments({**stage.env, **env})]
        start += command or [*stage.entrypoint, *stage.cmd]
        lines.append(f"exec {shlex.join(start)}")
        with log.open("wb") as file:
            return subprocess.Popen(
                _unshare(lines), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )


def process_1(unshare: subprocess.Popen[bytes]) -> int:
    """Return the id, outside, of a container's process 1."""
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
    return int(children[0])


def _python_like(base_image: str) -> Path:
    """Return a Python of the base image's version, or the one that runs the tests."""
    wanted = shutil.which("python" + base_image.partition(":")[2].partition("-")[0])
    if wanted and not subprocess.run([wanted, "-c", ""], capture_output=True).returncode:
        return Path(wanted)
    return Path(getattr(sys, "_base_executable", sys.executable))


def _assignments(env: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in env.items()]


def _unshare(lines: Sequence[str]) -> list[str]:
    script = "\n".join(["set -eu", *lines])
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]


def _namespace(lines: Sequence[str]) -> None:
    done = subprocess.run(_unshare(lines), capture_output=True, text=True)
    assert not done.returncode, f"{lines[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

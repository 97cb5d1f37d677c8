"""Builds the real Dockerfile without a registry: on a base image made here, from packages fetched beforehand.

The base images of the Dockerfile cannot be had where no registry is reached, so a Debian of the same generation, made
by debootstrap with Python in it, stands in for both. Everything else is the Dockerfile's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STAND_IN = "localhost/stand-in"
# How long one command may take, seconds, on two busy cores.
_LONGEST = 1500


class Images:
    """A store of images of its own, in a folder that can be thrown away.

    Args:
        folder: where it goes; about 5 GB with both targets built.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._env = {**os.environ, "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf")}
        # overlay keeps one copy of each file; vfs, which works everywhere, one for every layer.
        self._store("overlay")
        if subprocess.run(["buildah", "info"], env=self._env, capture_output=True).returncode != 0:
            self._store("vfs")

    def _store(self, driver: str) -> None:
        self._driver = driver
        text = f'[storage]\ndriver = "{driver}"\ngraphroot = "{self._folder}/graph"\nrunroot = "{self._folder}/run"\n'
        (self._folder / "storage.conf").write_text(text)

    def call(self, *command: str | Path) -> str:
        """Run a command on this store; its output, with the end of it in the error where it fails."""
        done = subprocess.run(command, cwd=ROOT, env=self._env, capture_output=True, text=True, timeout=_LONGEST)
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{(done.stdout + done.stderr)[-6000:]}"
        return done.stdout

    def prepare(self) -> None:
        """Make the stand-in and fetch the packages, both as the constraints say."""
        tree, wheels = self._folder / "tree", self._folder / "wheels"
        self.call("debootstrap", "--variant=minbase", "--include=ca-certificates,python3-venv", "bookworm", tree)
        container = self.call("buildah", "from", "scratch").strip()
        self.call("buildah", "add", "--quiet", container, tree, "/")
        self.call("buildah", "config", "--env", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self.call("buildah", "commit", "--quiet", "--rm", container, STAND_IN)
        shutil.rmtree(tree)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--constraint",
            "constraints.txt",
            "--wheel-dir",
            wheels,
        ]
        self.call(*map(str, pip), "torch", ".[parquet]", "hatchling", "setuptools", "wheel")
        for own in wheels.glob("megaclass-*.whl"):
            own.unlink()  # the Dockerfile builds it
        (self._folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")

    def build(self, target: str, *options: str) -> str:
        """Build a target of the Dockerfile, all of it anew; the image's name."""
        name = f"localhost/megaclass:{target}"
        # Without --no-cache buildah 1.28 finds nothing to mount from a stage that it takes from its cache.
        self.call(
            *(
                "buildah",
                "bud",
                "--layers",
                "--no-cache",
                "--pull-never",
                "--isolation",
                "chroot",
                "--format",
                "docker",
            ),
            *("--volume", f"{self._folder}/wheels:/wheels:ro", "--volume", f"{self._folder}/pip.conf:/etc/pip.conf:ro"),
            *("--build-arg", f"CPU_BASE={STAND_IN}", "--build-arg", f"GPU_BASE={STAND_IN}", *options),
            *("--ignorefile", "docker/Dockerfile.dockerignore", "--file", "docker/Dockerfile"),
            *("--target", target, "--tag", name, "."),
        )
        return name

    def config(self, name: str) -> dict[str, Any]:
        """What the image says about itself: user, environment, health check, command, layers."""
        return dict(json.loads(self.call("buildah", "inspect", "--type", "image", name))["Docker"])

    def layer_bytes(self, name: str) -> list[int]:
        """The size of each layer, the base's first."""
        table = self._folder / "graph" / f"{self._driver}-layers" / "layers.json"
        sizes = {layer.get("diff-digest"): layer.get("diff-size", 0) for layer in json.loads(table.read_text())}
        return [sizes[digest] for digest in self.config(name)["rootfs"]["diff_ids"]]

    def run(self, name: str, script: str, *options: str) -> str:
        """Run a bash script in a container of the image, as the image's user, in a network of its own; its output.

        That network has nothing but a loopback: what runs there fetches nothing, and meets no port of this machine.
        """
        container = self.call("buildah", "from", "--pull-never", name).strip()
        (self._folder / "script.sh").write_text(script)
        run = f"buildah run --isolation chroot --hostname localhost {' '.join(options)}"
        run += f" --volume {self._folder}/script.sh:/script.sh:ro {container} bash /script.sh 2>&1"
        try:
            return self.call("unshare", "--net", "bash", "-c", f"ip link set lo up && {run}")
        finally:
            self.call("buildah", "rm", container)

    def remove(self) -> None:
        """Give the space back."""
        self.call("buildah", "rm", "--all")
        self.call("buildah", "rmi", "--all", "--force")
        shutil.rmtree(self._folder)

"""Both targets of the Dockerfile, built for real on a stand-in for their bases, and the trainer running in one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.images import Images
from tests.support.tiny_dataset import write_tiny_dataset

USER = 10001
MEGABYTE = 1 << 20

# Two ranks train with metrics; meanwhile the image's own health check must come true. HEALTH is put in by the test.
TRAIN = """
set -euo pipefail
test "$(id -u):$(id -g)" = 10001:10001
test "$PWD" = /workspace
for place in /cache "$HOME" data runs; do touch "$place/writable"; done
if touch /opt/megaclass/writable 2> /dev/null; then echo "the code can be changed"; exit 1; fi
if HEALTH 2> /dev/null; then echo "healthy without a trainer"; exit 1; fi
megaclass --version
megaclass data verify data/tiny
launch/torchrun.sh --max-restarts 0 --nproc-per-node 2 -m megaclass train configs/demo.yaml \
  --dataset.path data/tiny --dataset.image-size 16 --backbone.dim 16 --optim.warmup-steps 5 --train.steps 60 \
  --train.global-batch-size 32 --train.checkpoint-every 20 --run.log-every 5 --observe.metrics-port 9500 &
trainer=$!
for try in $(seq 600); do
  if HEALTH 2> /dev/null; then echo "healthy"; break; fi
  sleep 0.2
done
wait "$trainer"
test -f runs/demo/summary.json
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    images = Images(tmp_path_factory.mktemp("images"))
    try:
        images.prepare()
        yield images
    finally:
        images.remove()


@pytest.fixture(scope="module")
def cpu(images: Images) -> str:
    return images.build("cpu")


@pytest.fixture(scope="module")
def gpu(images: Images) -> str:
    return images.build("gpu", "--build-arg", "EXTRAS=parquet")


def environment(images: Images, name: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in images.config(name)["config"]["Env"])


def check_config(images: Images, name: str) -> None:
    config = images.config(name)["config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["Cmd"] == ["megaclass", "--help"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    given = environment(images, name)
    caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "MPLCONFIGDIR")
    assert all(given[cache].startswith("/cache/") for cache in caches)
    assert given["HOME"] == "/tmp"


@pytest.mark.timeout(3000)
def test_the_cpu_image_is_built_and_says_how_it_is_to_be_run(images: Images, cpu: str) -> None:
    check_config(images, cpu)


@pytest.mark.timeout(3000)
def test_a_change_of_the_code_changes_small_layers_only(images: Images, cpu: str) -> None:
    sizes = images.layer_bytes(cpu)
    large = [size for size in sizes[1:] if size > 20 * MEGABYTE]  # the base comes first
    # The environment with pip, torch, the other packages. The project comes last, and is small.
    assert len(large) <= 3, sizes
    assert sum(sizes[-3:]) < 8 * MEGABYTE, sizes
    print(f"layers of the CPU image, MB: {[round(size / MEGABYTE, 1) for size in sizes]}")


@pytest.mark.timeout(3000)
def test_two_ranks_train_in_the_image_and_its_health_check_sees_it(images: Images, cpu: str, tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path / "data" / "tiny", num_classes=40, samples_per_class=8, unseen_classes=6)
    (tmp_path / "runs").mkdir()
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, USER, USER)
    health = shlex.join(images.config(cpu)["config"]["Healthcheck"]["Test"][1:])
    mounts = [f"--volume={tmp_path / name}:/workspace/{name}" for name in ("data", "runs")]
    said = images.run(cpu, TRAIN.replace("HEALTH", health), *mounts)
    assert "\nhealthy\n" in said, said
    written = tmp_path / "runs" / "demo"
    assert (written / "summary.json").stat().st_uid == USER
    assert list((written / "checkpoints").glob("step-*"))


@pytest.mark.timeout(3000)
def test_the_gpu_target_is_built_with_a_compiler_and_extras(images: Images, gpu: str) -> None:
    check_config(images, gpu)
    given = environment(images, gpu)
    assert given["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    compile_one = "echo 'int main(void) { return 0; }' | gcc -x c -o /tmp/a.out - && /tmp/a.out"
    headers = """python3 -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")'"""
    said = images.run(gpu, f"set -e\nid -u\n{compile_one}\n{headers}\nmegaclass --version\npython3 -c 'import pyarrow'")
    assert said.splitlines()[0] == str(USER)


@pytest.mark.timeout(3000)
def test_an_unknown_extra_is_refused(images: Images) -> None:
    with pytest.raises(AssertionError, match="EXTRAS cuda unknown; allowed are ann, "):
        images.build("requirements", "--build-arg", "EXTRAS=cuda")

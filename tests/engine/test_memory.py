"""How the KV cache is sized, what is free for it, and on how many cores it is computed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyllm.engine import memory
from pyllm.engine.config import EngineConfig
from pyllm.engine.errors import EngineStartError
from pyllm.engine.host import compute_cores, free_host_bytes, return_free_memory, total_host_bytes
from pyllm.engine.memory import num_kv_blocks

CPU = torch.device("cpu")
GIB = 1 << 30


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system of a machine with 10 GiB free and no control groups."""
    write(tmp_path, proc__meminfo=f"MemTotal: 99999999 kB\nMemAvailable: {10 * GIB // 1024} kB\n")
    return tmp_path


def limit_v2(root: Path, group: str, most: str, used: int, cached: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {cached}\ninactive_file 0\n")


def test_free_memory_is_the_limit_without_a_cgroup(root: Path) -> None:
    assert free_host_bytes(root) == 10 * GIB
    write(root, proc__self__cgroup="0::/\n")
    assert free_host_bytes(root) == 10 * GIB


def test_the_tightest_control_group_around_the_process_counts(root: Path) -> None:
    write(root, proc__self__cgroup="0::/pod/container\n")
    limit_v2(root, "pod/container", "max", GIB)
    assert free_host_bytes(root) == 10 * GIB
    limit_v2(root, "pod", str(4 * GIB), GIB)
    assert free_host_bytes(root) == 3 * GIB
    limit_v2(root, "pod/container", str(2 * GIB), GIB)
    assert free_host_bytes(root) == GIB
    limit_v2(root, "pod/container", str(GIB), 2 * GIB)
    assert free_host_bytes(root) == 0


def test_cgroup_limit_is_found_at_the_mount_root(root: Path) -> None:
    write(root, proc__self__cgroup="0::/kubepods/pod7\n")
    limit_v2(root, "", str(2 * GIB), GIB)
    assert free_host_bytes(root) == GIB


def test_cached_files_are_as_good_as_free(root: Path) -> None:
    write(root, proc__self__cgroup="0::/\n")
    limit_v2(root, "", str(2 * GIB), 2 * GIB, cached=GIB)
    assert free_host_bytes(root) == GIB


def test_the_first_version_of_control_groups_counts_too(root: Path) -> None:
    write(root, proc__self__cgroup="9:name=systemd:/\n4:cpu,memory:/box\n0::/\n")
    folder = root / "sys/fs/cgroup/memory/box"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{3 * GIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{2 * GIB}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {GIB // 2}\ntotal_active_file 0\n")
    assert free_host_bytes(root) == GIB + GIB // 2


def test_all_memory_is_the_machines_or_the_tightest_limit(root: Path) -> None:
    assert total_host_bytes(root) == 99999999 * 1024
    write(root, proc__self__cgroup="0::/pod\n")
    limit_v2(root, "pod", str(4 * GIB), 3 * GIB)
    assert total_host_bytes(root) == 4 * GIB


@pytest.fixture
def sixteen(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores with two threads each, all of them ours."""
    for core in range(16):
        folder = root / f"sys/devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 8},{core % 8 + 8}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    return root


def test_two_threads_of_a_core_count_once(sixteen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_cores(sixteen) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 9})
    assert compute_cores(sixteen) == 2


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 8), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8)],
)
def test_processor_limits_of_a_container(sixteen: Path, limit: str, cores: int) -> None:
    write(sixteen, proc__self__cgroup="0::/pod/container\n")
    (sixteen / "sys/fs/cgroup/pod").mkdir(parents=True)
    (sixteen / "sys/fs/cgroup/pod/cpu.max").write_text(f"{limit}\n")
    assert compute_cores(sixteen) == cores


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_processor_limits_of_the_first_version(sixteen: Path, mount: str) -> None:
    write(sixteen, proc__self__cgroup="4:cpu,cpuacct:/box\n")
    folder = sixteen / "sys/fs/cgroup" / mount / "box"
    folder.mkdir(parents=True)
    for quota, cores in (("-1", 8), ("300000", 3)):
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
        assert compute_cores(sixteen) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds a process to cores")
@pytest.mark.parametrize(("variables", "threads"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_the_engine_computes_on_the_cores_it_may_use(variables: dict[str, str], threads: int) -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import torch; torch.set_num_threads(2)\n"
        "from pyllm import LLM; from pyllm.server.flags import DEMO_FOLDER\n"
        "LLM(str(DEMO_FOLDER), quiet=True); print(torch.get_num_threads())\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept | variables)
    assert done.stdout == f"{threads}\n", done.stderr


def test_the_default_leaves_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_host_bytes", lambda: GIB)
    config = EngineConfig(model="m", max_num_seqs=4096)
    assert num_kv_blocks(config, CPU, 1 << 20, 2048) == 512
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 100 * GIB)
    assert num_kv_blocks(config, CPU, 1 << 20, 2048) == 4096, "and is 4 GiB at most"
    few = EngineConfig(model="m", max_num_seqs=3)
    assert num_kv_blocks(few, CPU, 1 << 20, 2048) == 3 * 128, "and no more than can be filled"


def test_a_gpu_is_filled_up_to_the_given_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))  # 20 GiB in use
    config = EngineConfig(model="m", max_num_seqs=4096, gpu_memory_utilization=0.5)
    assert num_kv_blocks(config, torch.device("cuda"), GIB, 32) == 20
    assert num_kv_blocks(config, torch.device("cuda"), GIB, 32, reserve=3 * GIB) == 17, "in addition to what steps need"
    few = EngineConfig(model="m", max_num_seqs=1, gpu_memory_utilization=0.5)
    assert num_kv_blocks(few, torch.device("cuda"), GIB, 32) == 20, "for the prefix cache, if for nothing else"
    idle = EngineConfig(model="m", max_num_seqs=1, gpu_memory_utilization=0.5, enable_prefix_caching=False)
    assert num_kv_blocks(idle, torch.device("cuda"), GIB, 32) == 2
    with pytest.raises(EngineStartError, match="raise --gpu-memory-utilization"):
        num_kv_blocks(config, torch.device("cuda"), 11 * GIB, 32)


@pytest.mark.parametrize(("device", "most"), [("cpu", 64), ("cuda", 256)])
def test_how_many_sequences_run_at_once_is_chosen_by_device(device: str, most: int) -> None:
    assert EngineConfig(model="m").most_seqs(device) == most
    assert EngineConfig(model="m", max_num_seqs=3).most_seqs(device) == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kv_cache_memory_bytes": 4000}, "room for 64 tokens, fewer than one request of 100: lower --max-model-len"
         " to 64, or raise --kv-cache-memory-bytes to 7000."),
        ({"kv_cache_memory_bytes": 999}, "room for 0 tokens, fewer than one request of 100: raise "
         "--kv-cache-memory-bytes to 7000."),
        ({"num_kv_blocks": 2}, "or raise --num-kv-blocks to 7."),
        ({"kv_cache_memory_bytes": 1 << 50}, "but only "),
        ({}, "or set --kv-cache-memory-bytes to 7000 if that much is available."),
    ],
)  # fmt: skip
def test_too_little_is_one_sentence_that_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], sentence: str
) -> None:
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 4000)
    with pytest.raises(EngineStartError) as caught:
        num_kv_blocks(EngineConfig(model="m", **settings), CPU, 1000, 100)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_memory_between_living_objects_is_returned() -> None:
    """The library keeps what is freed below the last object of its heap, so a burst of work would stay."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    blocks = [bytes(600) for _ in range(200_000)]  # larger than what Python's own allocator serves
    kept = blocks[::1000]
    del blocks
    before = resident()
    return_free_memory()
    assert len(kept) == 200
    assert before - resident() > 60 * 2**20

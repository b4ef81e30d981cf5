"""How many cores each replica gets, and how many replicas a load needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.needs("Ray"), pytest.mark.filterwarnings("ignore")]  # Ray's own, while it is imported


@pytest.mark.parametrize(
    ("machines", "replicas", "cores"),
    [
        ([16], 1, 16), ([16], 2, 8), ([16], 3, 5), ([16], 16, 1), ([2], 4, 0.5), ([2], 3, 0.5), ([1], 3, 0.33),
        ([16, 16], 1, 16), ([16, 16], 3, 8), ([16, 4], 3, 5), ([0, 8], 2, 4), ([2, 2], 5, 0.5),
    ],
)  # fmt: skip
def test_cores_are_shared_so_that_all_replicas_fit(
    monkeypatch: pytest.MonkeyPatch, machines: list[int], replicas: int, cores: float
) -> None:
    import ray

    from pyllm.server.replicas.application import cpus_for_each

    nodes = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in machines]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0}}])
    assert cpus_for_each(replicas) == cores
    assert sum(int(count / cores) for count in machines) >= replicas


@pytest.mark.parametrize(
    ("replicas", "requests", "usage", "wanted"),
    [
        (1, 0, {}, 0),
        (1, 20, {}, 2),
        (2, 20, {"a": 0.1, "b": 0.1}, 2),
        (2, 5, {"a": 0.9, "b": 0.9}, 2.25),
        (0, 5, {}, 1),
    ],
)
def test_replicas_follow_the_requests_and_the_caches(
    replicas: int, requests: float, usage: dict[str, float], wanted: float
) -> None:
    from pyllm.server.replicas.application import KV_CACHE_USAGE, scale_by_load

    context: Any = SimpleNamespace(
        current_num_replicas=replicas, target_num_replicas=1, total_num_requests=requests,
        aggregated_metrics={KV_CACHE_USAGE: usage}, config=SimpleNamespace(get_target_ongoing_requests=lambda: 10),
    )  # fmt: skip
    assert scale_by_load(context) == (pytest.approx(wanted), {})


def test_the_import_path_is_the_builder_after_any_import() -> None:
    import pyllm.server.replicas
    from pyllm.server.replicas import application

    assert pyllm.server.replicas.app is application.app

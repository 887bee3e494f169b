"""Runs reservations on a simulated cluster and writes what came of them; see `test_placement.py`."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from rlhf_ray.errors import ResourceError
from rlhf_ray.placement.groups import Placement, inventory, reserve
from rlhf_ray.placement.layout import lay_out
from rlhf_ray.placement.plan import Plan

NODES = {"trainer": 4, "gpu-a": 2, "gpu-b": 2}


def plan_of(groups: dict[str, tuple[int, float]], **options: Any) -> Plan:
    bundles: list[dict[str, float]] = []
    seats = {}
    for name, (count, cpus) in groups.items():
        seats[name] = list(range(len(bundles), len(bundles) + count))
        bundles += [{"CPU": cpus}] * count
    return Plan(bundles, seats, timeout_s=3.0 if "timeout_s" not in options else options.pop("timeout_s"), **options)


def nodes_of(placement: Placement) -> dict[str, list[str]]:
    """The name of the node of each rank of each group."""

    def where() -> str:
        return ray.get_runtime_context().get_node_labels()["name"]

    found: dict[str, list[str]] = {}
    for name, bundles in placement.order.items():
        refs = []
        for rank in range(len(bundles)):
            strategy = placement.options(name, rank)["scheduling_strategy"]
            refs.append(ray.remote(where).options(num_cpus=0.1, scheduling_strategy=strategy).remote())
        found[name] = ray.get(refs, timeout=60)
    return found


def gpus_of(placement: Placement) -> dict[str, list[str]]:
    """Node and GPU numbers of each rank of each group, as its actor sees them, while all are alive."""

    class Process:
        def seat(self) -> str:
            context = ray.get_runtime_context()
            return f"{context.get_node_labels()['name']} {context.get_accelerator_ids()['GPU']}"

    ranks = {name: range(len(bundles)) for name, bundles in placement.order.items()}
    actors = {
        name: [ray.remote(Process).options(**placement.options(name, rank)).remote() for rank in numbers]
        for name, numbers in ranks.items()
    }
    found = {name: ray.get([actor.seat.remote() for actor in some], timeout=60) for name, some in actors.items()}
    for some in actors.values():
        for actor in some:
            ray.kill(actor)
    return found


def main(out: Path) -> None:
    cluster = Cluster()
    cluster.add_node(num_cpus=4, labels={"name": "trainer", "role": "trainer"}, include_dashboard=False)
    for name in ("gpu-a", "gpu-b"):
        cluster.add_node(num_cpus=2, num_gpus=2, labels={"name": name, "role": "rollout"})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    found: dict[str, Any] = {"errors": {}}
    try:
        labels = {"rollout": {"role": "rollout"}, "policy": {"role": "trainer"}}
        with reserve(
            plan_of({"policy": (2, 1), "rollout": (4, 1)}, labels=labels, timeout_s=60.0), out.parent
        ) as placed:
            found["labelled"] = {name: sorted(nodes) for name, nodes in nodes_of(placed).items()}
        spread = plan_of({"policy": (3, 1), "rollout": (2, 1)}, spread=("policy",), timeout_s=60.0)
        with reserve(spread, out.parent) as placed:
            found["spread"] = nodes_of(placed)
        half = {"CPU": 0.25, "GPU": 0.5}
        shared = Plan(
            [{"CPU": 0.5, "GPU": 1.0}] * 4,
            {"policy": [0, 1, 2, 3], "rollout": [0, 1, 2, 3]},
            portions={"policy": half, "rollout": half},
            timeout_s=60.0,
        )
        with reserve(shared, out.parent) as placed:
            found["shared"] = gpus_of(placed)
        packed = plan_of({"policy": (8, 1)}, timeout_s=60.0)
        names = [node.labels["name"] for node in inventory()]
        found["foretold"] = dict(Counter(names[seat.node] for seat in lay_out(packed, inventory()).seats))
        with reserve(packed, out.parent) as placed:
            found["ranks"] = nodes_of(placed)
            found["ranks_per_node"] = dict(Counter(found["ranks"]["policy"]))
        refused = {
            "unknown label": plan_of({"policy": (1, 1)}, labels={"policy": {"role": "nowhere"}}),
            "too large": plan_of({"policy": (1, 5)}),
            "too many": plan_of({"policy": (40, 1)}),
            "too spread": plan_of({"policy": (9, 0.5)}, spread=("policy",)),
            "autoscaling": plan_of({"policy": (40, 1), "rollout": (1, 1)}, autoscaling=True),
            "crowded": plan_of({"policy": (2, 3)}),
        }
        for case, plan in refused.items():
            found["errors"][case] = refusal(plan, out.parent)
        for case, taken, plan in (
            ("busy", {"CPU": 4.0}, plan_of({"policy": (5, 1)})),
            ("busy label", {"CPU": 1.5}, plan_of({"policy": (2, 1), "rollout": (3, 1)}, labels=labels)),
            ("busy spread", {"CPU": 1.5}, plan_of({"policy": (1, 1), "rollout": (3, 1)}, spread=("rollout",))),
        ):
            place = "trainer" if case == "busy" else "gpu-a"
            other = placement_group([taken], bundle_label_selector=[{"name": place}])
            ray.get(other.ready(), timeout=30)
            found["errors"][case] = refusal(plan, out.parent)
            remove_placement_group(other)
        with reserve(plan_of({"rollout": (1, 1)}, spread=("rollout",), timeout_s=60.0), out.parent) as placed:
            found["joined"] = joined(placed, cluster)
        table = placement_group_table().values()
        found["left"] = [group["state"] for group in table if group["state"] not in ("REMOVED",)]
    finally:
        ray.shutdown()
        cluster.shutdown()
    out.write_text(json.dumps(found))


def joined(placement: Placement, cluster: Cluster) -> dict[str, Any]:
    """Nodes of engines that join one by one and at once, first on nodes that are there and then on new ones."""

    class Engine:
        def where(self) -> str:
            return ray.get_runtime_context().get_node_labels()["name"]

    def launch(rank: int) -> Any:
        return ray.remote(Engine).options(**placement.options("rollout", rank)).remote()

    engines = {rank: launch(rank) for rank in range(3)}
    found: dict[str, Any] = {"there": ray.get([engine.where.remote() for engine in engines.values()], timeout=60)}
    # Two for which no node is left wait at the same time, and the first new node has room for both.
    engines |= {rank: launch(rank) for rank in (3, 4)}
    cluster.add_node(num_cpus=4, labels={"name": "new-0"})
    found["first"] = ray.get([engines[rank].where.remote() for rank in (3, 4)], timeout=60)
    found["doubled"] = [placement.doubled("rollout", rank) for rank in range(5)]
    # As the pool does, one of them is placed again.
    ray.kill(engines[4])
    placement.release("rollout", 4)
    again = ray.remote(Engine).options(**{**placement.options("rollout", 4), "name": "again"}).remote()
    cluster.add_node(num_cpus=4, labels={"name": "new-1"})
    found["second"] = ray.get(again.where.remote(), timeout=60)
    found["doubled at last"] = [placement.doubled("rollout", rank) for rank in range(5)]
    placement.release("rollout", 1)
    for engine in (*engines.values(), again):
        ray.kill(engine)
    found["after release"] = sum(group["state"] == "CREATED" for group in placement_group_table().values())
    return found


def refusal(plan: Plan, logs: Path) -> str:
    try:
        with reserve(plan, logs):
            return "granted"
    except ResourceError as error:
        return str(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

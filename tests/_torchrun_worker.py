"""One of four processes of a torchrun: what each way to name its rank gives it, as JSON into the folder of argv[1].

The processes are a mesh of 2 (data) by 2 (tensor).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DistributedSampler

from aioloader import DataLoader, Pipeline

N = 26


def main() -> None:
    found: dict[str, Any] = {}
    found["environment"] = list(Pipeline(range(N)).shard())  # before torch.distributed is there
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    mine = groups[0 if rank in (0, 3) else 1]

    def collective(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective is called")

    names = ("all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast")
    kept = {name: getattr(dist, name) for name in names}
    for name in kept:
        setattr(dist, name, collective)
    found["distributed"] = list(Pipeline(range(N)).shuffle(seed=1).shard())
    found["group"] = list(Pipeline(range(N)).shard(group=mine))
    found["mesh"] = list(Pipeline(range(N)).shard(mesh=mesh["data"]))
    found["pair"] = list(Pipeline(range(N)).shard(mesh=(mesh, "data")))
    found["stream"] = list(Pipeline(lambda: iter(range(N))).map(abs).shard(even="drop"))
    sampler: Any = DistributedSampler(range(N), shuffle=True, seed=2)  # type: ignore[arg-type]
    loader: Any = DataLoader(range(N), batch_size=4, sampler=sampler, num_workers=2)
    found["sampler"] = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found["sampler"].append([batch.tolist() for batch in loader])
    loader.set_epoch(2)
    steps = iter(loader)
    next(steps)
    state = json.loads(json.dumps(loader.state_dict()))
    found["rest"] = [batch.tolist() for batch in steps]
    again: Any = DataLoader(range(N), batch_size=4, sampler=sampler, num_workers=0)
    again.load_state_dict(state)
    again.set_epoch(state["epoch"])
    found["resumed"] = [batch.tolist() for batch in again]
    for name, function in kept.items():
        setattr(dist, name, function)
    dist.barrier()
    dist.destroy_process_group()
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

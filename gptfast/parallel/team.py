"""The processes of one run, and their collectives.

    with join("fsdp", backend="nccl", device="cuda", tensor=2) as team:
        print(team)                       # fsdp: 8 ranks = 1 replica x 4 shards x 2 tensor ranks

Rank numbers vary fastest over tensor ranks, so that these share a node's fast links, then over shards, then over
replicas. Tensor ranks work on the same sequences, all others on different ones.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gptfast.errors import UserError

from . import Launch, launch

HUNG_S = 600.0  # a collective that takes longer ends the job; if a rank dies, torchrun ends it at once


@dataclass
class Team:
    """The ranks that share the work. With a single process, every method is the identity."""

    mode: str = "none"  # none, ddp, fsdp or hsdp
    launched: Launch = field(default_factory=Launch)
    replicas: int = 1  # groups that each hold all weights
    shards: int = 1  # ranks, or tensor groups, over which one replica's weights are split
    tensor: int = 1  # ranks over which each matrix product is split
    device: str = "cpu"
    mesh: DeviceMesh | None = None  # (replicas, shards, tensor)
    _control: Any = None  # a gloo group for collectives between the hosts
    _answer: Tensor | None = None  # buffer of the pending `agree`, and the work that fills it
    _asked: Any = None

    @property
    def rank(self) -> int:
        return self.launched.rank

    @property
    def size(self) -> int:
        return self.launched.size

    @property
    def is_main(self) -> bool:
        """Returns whether this rank prints, logs and writes for all."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Returns how many ranks, or tensor groups, work on different sequences."""
        return self.replicas * self.shards

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    def __str__(self) -> str:
        if self.size == 1:
            return "one process"
        parts = f"{self.replicas} replicas x {self.shards} shards x {self.tensor} tensor ranks"
        return f"{self.mode}: {self.size} ranks = {parts}"

    def share(self, micro_batches: int) -> int:
        """Returns this rank's number of micro-batches per update. Raises UserError if they cannot be split evenly."""
        if micro_batches % self.data_size:
            fit = -(-micro_batches // self.data_size) * self.data_size
            raise UserError(
                f"--gradient_accumulation_steps={micro_batches}: {self.data_size} ranks cannot share that many "
                f"micro-batches; give a multiple, such as {fit}"
            )
        return micro_batches // self.data_size

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean over the ranks of a tensor on the device."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def agree(self, number: int) -> int:
        """Returns the largest number that any rank passed in the previous call, 0 at first, without waiting.

        Every rank must call it equally often; all get the same results.
        """
        if self.size == 1:
            return number
        answer = 0
        if self._asked is not None:
            self._asked.wait()
            assert self._answer is not None
            answer = int(self._answer)
        self._answer = torch.tensor(number)
        self._asked = dist.all_reduce(self._answer, dist.ReduceOp.MAX, group=self._control, async_op=True)
        return answer

    def gather(self, item: Any) -> list[Any]:
        """Returns every rank's item, by rank; items must be picklable. Waits for all ranks."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self._control)
        return items

    def barrier(self) -> None:
        """Waits until every rank has called this."""
        if self.size > 1:
            dist.barrier(group=self._control)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.launched.by_torchrun and kind is None:
            dist.destroy_process_group()


def join(
    mode: str = "ddp", *, backend: str = "nccl", device: str = "cuda", tensor: int = 1, shard_size: int = 0
) -> Team:
    """Returns this process's team: all ranks of torchrun's, or the process alone.

    mode: ddp keeps all weights on every rank; fsdp splits them over all; hsdp over `shard_size` ranks (0: those of a
    node), with a copy in each such group. tensor: ranks that share each matrix product, with fsdp. Raises
    UserError for sizes that do not divide the number of ranks.
    """
    launched = launch()
    if not launched.by_torchrun:
        if tensor > 1:
            raise UserError(f"--tensor_parallel={tensor} needs ranks: start with torchrun --nproc_per_node={tensor}")
        return Team(device=device)
    if tensor > 1 and mode != "fsdp":
        raise UserError(f"--tensor_parallel={tensor} goes with --parallel=fsdp, not {mode}")
    if launched.size % tensor:
        raise UserError(f"--tensor_parallel={tensor} does not divide the {launched.size} ranks")
    groups = launched.size // tensor
    wanted = {"ddp": 1, "fsdp": groups, "hsdp": shard_size or max(1, launched.local_size // tensor)}[mode]
    if groups % wanted:
        raise UserError(f"--shard_size={wanted} does not divide the {groups} ranks or tensor groups")
    if device.startswith("cuda"):
        device = f"cuda:{launched.local_rank}"
        torch.cuda.set_device(device)
    elif backend == "nccl":
        backend = "gloo"  # NCCL has no CPU
    _meet(backend, launched)
    shape = (groups // wanted, wanted, tensor)
    mesh = init_device_mesh(torch.device(device).type, shape, mesh_dim_names=("replica", "shard", "tensor"))
    control = dist.new_group(backend="gloo")
    return Team(mode, launched, *shape, device=device, mesh=mesh, _control=control)


def _meet(backend: str, launched: Launch) -> None:
    """Makes the process group.

    Within one node torchrun's store outlives a restart, and a rank would find addresses of dead processes there (torch
    2.13), so each attempt uses its own names. Across nodes each attempt has a new store, and nodes count differently.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    if launched.local_size == launched.size:
        store = dist.PrefixStore(f"attempt-{launched.attempt}", store)
    timeout = datetime.timedelta(seconds=HUNG_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


ALONE = Team()

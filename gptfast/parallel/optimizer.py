"""The sharded optimizer: each rank keeps 1/world of the state and does 1/world of the work.

AdamW is elementwise: a rank steps the rows it holds or, with ddp, where every rank holds all rows, its share of them.
Muon needs whole matrices. Each matrix has one owner, which keeps its momentum and, when weights are split, a whole copy
of it: gradients are sent to the owners while AdamW steps, and weights are sent back (each rank does 1/world of the
Newton-Schulz products; the communication of "distributed Muon", Liu et al. 2025, arXiv:2502.16982). With ddp the owners
already have the gradients; only the updated weights are sent, while AdamW steps.

In ZeRO's terms this is stage 1 with ddp and stage 3 with fsdp (Rajbhandari et al., arXiv:1910.02054).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gptfast.config import GPTConfig

from .split import Rectangle, chunk, local, rectangles, stacked_rows
from .team import Team


@dataclass
class Share:
    """A tensor that this rank steps: some rows of its part of a parameter."""

    index: int  # the parameter's index, counted over all groups as torch does
    p: nn.Parameter
    low: int  # first row, within local(p)
    high: int
    tensor: Tensor  # those rows; a view


@dataclass
class Matrix:
    """A whole matrix that Muon steps on its owner."""

    index: int  # its parameter's index
    number: int  # its ordinal among the matrices stacked in the parameter
    p: nn.Parameter
    rows: tuple[int, int]  # its rows in the whole parameter
    columns: int
    owner: int  # rank within the sharing group
    tensor: Any = None  # a Tensor on the owner: a view of the parameter with ddp, else a copy


class ShardedOptimizer:
    """Takes over `optimizer`, made for the parallelized model and without state, and steps it share by share.

    model, called: the argument and the result of `parallelize`; shapes: `whole_shapes(model)` from before it.
    `param_groups` are the optimizer's own, so a schedule can set them as usual; their tensors are this rank's shares.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, called: nn.Module, shapes: dict[str, torch.Size],
        config: GPTConfig, team: Team,
    ) -> None:  # fmt: skip
        self.optimizer, self.called, self.team, self.config, self.shapes = optimizer, called, team, config, shapes
        self.param_groups = optimizer.param_groups
        # Stored, because between forward and backward the model has FSDP's gathered weights in their place.
        self.parameters = [p for group in self.param_groups for p in group["params"]]
        name_of = {id(p): name for name, p in model.named_parameters()}
        self.names = [name_of[id(p)] for p in self.parameters]
        both = model.named_parameters(remove_duplicate=False)
        self.aliases = {name: name_of[id(p)] for name, p in both if name_of[id(p)] != name}  # tied weights
        self._group_sizes = [len(group["params"]) for group in self.param_groups]
        self._whole_rows = [{"rows": group["rows"]} if "rows" in group else {} for group in self.param_groups]
        self.replicated = team.mode == "ddp"
        assert team.mesh is not None
        self.members, self.group = self._sharers()
        self.me = self.members.index(team.rank)
        self.shares: list[Share] = []
        self.matrices: list[Matrix] = []
        index = 0
        for group in self.param_groups:
            by_matrix = group.get("kind") == "muon"
            for p in group["params"]:
                self.shares += [] if by_matrix else self._share_of(index, p)
                self.matrices += self._matrices_of(index, p) if by_matrix else []
                index += 1
        self._choose_owners()
        self._copies = [self._count_copies(name) for name in self.names]
        if not self.replicated:
            self._plan_travel()
        self.refresh()
        self._take_over()

    def _sharers(self) -> tuple[list[int], Any]:
        """Returns the ranks that share the state, and their group: all with ddp, else those of one replica."""
        team = self.team
        if team.replicas == 1 or self.replicated:
            return list(range(team.size)), dist.group.WORLD
        replica_size = team.shards * team.tensor
        groups = [list(range(first, first + replica_size)) for first in range(0, team.size, replica_size)]
        made = [dist.new_group(ranks) for ranks in groups]  # every rank makes every group
        mine = team.rank // replica_size
        return groups[mine], made[mine]

    def _share_of(self, index: int, p: nn.Parameter) -> list[Share]:
        local_rows = local(p)
        low, high = chunk(len(local_rows), len(self.members), self.me) if self.replicated else (0, len(local_rows))
        return [Share(index, p, low, high, local_rows[low:high])] if high > low else []

    def _matrices_of(self, index: int, p: nn.Parameter) -> list[Matrix]:
        name, matrices, row = self.names[index], [], 0
        for number, rows in enumerate(stacked_rows(name, self.shapes[name], self.config)):
            matrices.append(Matrix(index, number, p, (row, row + rows), self.shapes[name][1], -1))
            row += rows
        return matrices

    def _choose_owners(self) -> None:
        """Assigns owners: the largest matrix first, to the rank with the least work so far; the same on every rank."""
        load = [0.0] * len(self.members)
        for matrix in sorted(self.matrices, key=lambda m: -_work(m)):
            matrix.owner = min(range(len(load)), key=load.__getitem__)
            load[matrix.owner] += _work(matrix)

    @property
    def owned(self) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.owner == self.me]

    def _take_over(self) -> None:
        """Replaces the parameters in the optimizer's groups with this rank's tensors."""
        index = 0
        for group in self.param_groups:
            indices = range(index, index + len(group["params"]))
            index += len(group["params"])
            if group.get("kind") == "muon":
                mine = [matrix.tensor for matrix in self.owned if matrix.index in indices]
                group["rows"] = [[len(tensor)] for tensor in mine]
            else:
                mine = [share.tensor for share in self.shares if share.index in indices]
            group["params"] = mine

    # ---- a step

    @torch.no_grad()
    def step(self) -> None:
        """Makes one update from the gradients of the model's parameters; then every rank's weights are updated."""
        if self.replicated:
            for matrix in self.owned:
                matrix.tensor.grad = local(matrix.p.grad)[slice(*matrix.rows)]
            self._step_these([matrix.tensor for matrix in self.owned])
            finish = self._spread(self._matrix_views())
            self._step_shares()
            finish()
            self._spread(self._share_views())()
        else:
            arrive = self._gather_matrices(lambda matrix: local(matrix.p.grad))
            self._step_shares()
            for matrix, gradient in zip(self.owned, arrive(), strict=True):
                matrix.tensor.grad = gradient
            self._step_these([matrix.tensor for matrix in self.owned])
            self._scatter_matrices()

    def _step_shares(self) -> None:
        for share in self.shares:
            if share.p.grad is not None:
                share.tensor.grad = local(share.p.grad)[share.low : share.high]
        self._step_these([share.tensor for share in self.shares])

    def _step_these(self, tensors: list[Tensor]) -> None:
        """Steps the tensors that have a gradient, then drops the gradients; the optimizer skips the other tensors."""
        self.optimizer.step()
        for tensor in tensors:
            tensor.grad = None

    def sync_gradients(self, needed: bool) -> None:
        """Sets whether the next backward pass reduces gradients over the ranks; only the last of an update must."""
        if isinstance(self.called, DistributedDataParallel):
            self.called.require_backward_grad_sync = needed
        else:
            self.called.set_requires_gradient_sync(needed)  # type: ignore[operator]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters:
            p.grad = None

    def gradients(self) -> list[Tensor]:
        """Returns this rank's parts of the gradients."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]

    def grad_norm(self) -> Tensor:
        """Returns the joint 2-norm () of all gradients over all ranks, the same on every rank."""
        copies = [count for count, p in zip(self._copies, self.parameters, strict=True) if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(self.gradients())).square()
        total = (squares / torch.tensor(copies, device=squares.device)).sum()
        if not self.replicated:
            dist.all_reduce(total, group=self.group)
        return total.sqrt()

    @property
    def found_inf(self) -> Tensor | None:
        """Returns () fp32, 1 where the step is refused; see gptfast.optim."""
        return self.optimizer.found_inf  # type: ignore[attr-defined]

    @found_inf.setter
    def found_inf(self, refused: Tensor | None) -> None:
        self.optimizer.found_inf = refused  # type: ignore[attr-defined]

    def _count_copies(self, name: str) -> int:
        """Returns how many of the sharing ranks hold the same elements of a parameter's gradient."""
        if self.replicated:
            return 1
        held = sum(math.prod(r.size) for rank in self.members for r in self.rectangles(name, rank))
        return held // self.shapes[name].numel()

    def rectangles(self, name: str, rank: int) -> list[Rectangle]:
        return rectangles(name, self.shapes[name], self.config, self.team, rank)

    # ---- communication

    def _matrix_views(self) -> list[list[Tensor]]:
        """Returns each rank's matrices as views of this rank's weights (ddp)."""
        return [
            [local(m.p)[slice(*m.rows)] for m in self.matrices if m.owner == rank]
            for rank in range(len(self.members))
        ]  # fmt: skip

    def _share_views(self) -> list[list[Tensor]]:
        """Returns each rank's shares as views of this rank's weights (ddp)."""
        stepped = {id(matrix.p) for matrix in self.matrices}
        held = [local(p) for p in self.parameters if id(p) not in stepped]
        ways = len(self.members)
        return [[tensor[slice(*chunk(len(tensor), ways, rank))] for tensor in held] for rank in range(ways)]

    def _spread(self, views: list[list[Tensor]]) -> Callable[[], None]:
        """Starts exchanging every rank's views with all; returns a function that waits and writes the received ones."""
        sizes = [sum(view.numel() for view in mine) for mine in views]
        longest = max(sizes)
        if longest == 0:
            return lambda: None
        some = next(view for mine in views for view in mine)
        sent = some.new_zeros(longest)
        if sizes[self.me]:
            sent[: sizes[self.me]] = torch.cat([view.reshape(-1) for view in views[self.me]])
        received = some.new_empty(len(views) * longest)
        work = dist.all_gather_into_tensor(received, sent, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            for rank, mine in enumerate(views):
                if rank != self.me:
                    flat = received[rank * longest : rank * longest + sizes[rank]]
                    for view, values in zip(mine, flat.split([view.numel() for view in mine]), strict=True):
                        view.copy_(values.view_as(view))

        return finish

    def _plan_travel(self) -> None:
        """Sets `_parts_here[owner]`, our parts of an owner's matrices, and `_parts_there[rank]`, a rank's of ours."""

        def parts(owner: int, rank: int) -> list[tuple[Matrix, Rectangle]]:
            theirs = [matrix for matrix in self.matrices if matrix.owner == owner]
            return [
                (matrix, r)
                for matrix in theirs
                for r in self.rectangles(self.names[matrix.index], self.members[rank])
                if r.matrix == matrix.number
            ]

        ranks = range(len(self.members))
        self._parts_here = [parts(owner, self.me) for owner in ranks]
        self._parts_there = [parts(self.me, rank) for rank in ranks]

    def _exchange(self, outgoing: list[list[Tensor]], incoming: list[list[Tensor]]) -> Callable[[], None]:
        """Starts sending `outgoing[rank]` to each rank; returns a function that waits and fills `incoming[rank]`."""
        like = local(self.parameters[0])
        flat = [tensor.reshape(-1) for mine in outgoing for tensor in mine]
        sent = torch.cat(flat) if flat else like.new_empty(0)
        send_sizes, receive_sizes = (
            [sum(tensor.numel() for tensor in mine) for mine in side] for side in (outgoing, incoming)
        )
        received = like.new_empty(sum(receive_sizes))
        work = dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            targets = [tensor for mine in incoming for tensor in mine]
            for target, values in zip(targets, received.split([t.numel() for t in targets]), strict=True):
                target.copy_(values.view_as(target))

        return finish

    def _gather_matrices(self, held: Callable[[Matrix], Tensor]) -> Callable[[], list[Tensor]]:
        """Starts sending this rank's parts to the owners; returns a function that waits for its own matrices."""
        whole = {id(m): local(m.p).new_empty(m.rows[1] - m.rows[0], m.columns) for m in self.owned}
        if not self.matrices:
            return list
        outgoing = [[r.of_local(held(m)) for m, r in parts] for parts in self._parts_here]
        arrive = self._exchange(outgoing, [[r.of_whole(whole[id(m)]) for m, r in parts] for parts in self._parts_there])

        def finish() -> list[Tensor]:
            arrive()
            return [whole[id(m)] for m in self.owned]

        return finish

    def _scatter_matrices(self) -> None:
        """Sends the ranks their parts of this rank's matrices; receives its own parts from the other owners."""
        if self.matrices:
            outgoing = [[r.of_whole(m.tensor) for m, r in parts] for parts in self._parts_there]
            self._exchange(outgoing, [[r.of_local(local(m.p)) for m, r in parts] for parts in self._parts_here])()

    @torch.no_grad()
    def refresh(self) -> None:
        """Updates the owners' copies of the matrices from the weights, after these were set from outside."""
        if self.replicated:
            for matrix in self.owned:
                matrix.tensor = local(matrix.p)[slice(*matrix.rows)] if matrix.tensor is None else matrix.tensor
        else:
            for matrix, whole in zip(self.owned, self._gather_matrices(lambda m: local(m.p))(), strict=True):
                matrix.tensor = whole if matrix.tensor is None else matrix.tensor.copy_(whole)

    # ---- state, expressed for the whole model

    def state_bytes(self) -> int:
        """Returns the bytes of this rank's optimizer state."""
        return sum(t.nbytes for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t))

    def pieces(self) -> Iterator[tuple[int, str, Rectangle, Tensor]]:
        """Yields this rank's state: (parameter index, key, rectangle, its part), without single numbers."""
        for share in self.shares:
            for key, value in self.optimizer.state[share.tensor].items():
                if value.dim():
                    for rectangle, rows in self._parts(share, value):
                        yield share.index, key, rectangle, rows
        for m in self.owned:
            for key, value in self.optimizer.state[m.tensor].items():
                whole = Rectangle(m.number, tuple(value.shape), (0,) * value.dim(), tuple(value.shape), 0)
                yield m.index, key, whole, value

    def _parts(self, share: Share, value: Tensor) -> Iterator[tuple[Rectangle, Tensor]]:
        """Yields the rectangles of a share, each with its rows of `value`, a tensor shaped like the share."""
        name = self.names[share.index]
        for held in self.rectangles(name, self.team.rank):
            a, b = max(held.start, share.low), min(held.start + held.size[0], share.high)
            if a < b:
                offset = (held.offset[0] + a - held.start, *held.offset[1:])
                yield (
                    Rectangle(held.matrix, held.shape, offset, (b - a, *held.size[1:]), a - share.low),
                    value[a - share.low : b - share.low],
                )

    def settings(self) -> dict[str, Any]:
        """Returns the state_dict of the whole model's optimizer; of the state it has only AdamW's step counts."""
        groups, index = [], 0
        for group, rows, count in zip(self.param_groups, self._whole_rows, self._group_sizes, strict=True):
            groups.append({**group, **rows, "params": list(range(index, index + count))})
            index += count
        steps = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        of_muon = {matrix.index for matrix in self.matrices}
        counted = range(index) if steps else []
        return {"state": {i: {"step": steps[0].clone()} for i in counted if i not in of_muon}, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Loads this rank's part of the state_dict of an optimizer over the whole model."""
        for group, its in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in its.items() if key not in ("params", "rows")})
        self.optimizer.state.clear()
        for share in self.shares:
            state = {}
            for key, value in saved["state"].get(share.index, {}).items():
                state[key] = torch.empty_like(share.tensor) if value.dim() else value.to(share.tensor.device, copy=True)
                if value.dim():
                    matrices = value.split(stacked_rows(self.names[share.index], value.shape, self.config))
                    for rectangle, rows in self._parts(share, state[key]):
                        rows.copy_(rectangle.of_whole(matrices[rectangle.matrix]))
            if state:
                self.optimizer.state[share.tensor] = state
        for m in self.owned:
            state = {}
            for key, value in saved["state"].get(m.index, {}).items():
                name = self.names[m.index]
                lines = stacked_rows(name, self.shapes[name], self.config)
                if value.dim() == 1:  # NorMuon's: one number per line of each matrix
                    lines = [max(count, m.columns) for count in lines]
                state[key] = value.split(lines)[m.number].to(m.tensor.device, copy=True)
            if state:
                self.optimizer.state[m.tensor] = state
        self.refresh()


def _work(matrix: Matrix) -> float:
    """Returns the cost of a matrix's Newton-Schulz products, up to a factor."""
    m, n = matrix.rows[1] - matrix.rows[0], matrix.columns
    return float(m * n * min(m, n))

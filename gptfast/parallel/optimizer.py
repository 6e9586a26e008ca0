"""The optimizer shared out over the ranks: each keeps 1/world of its state, and does 1/world of its work.

AdamW is elementwise: a rank steps the rows it holds, or with ddp, where every rank holds all, its share of the rows.
Muon needs whole matrices. Each has one owner, which keeps its momentum and, when weights are split, a whole copy of it:
gradients travel to the owners while AdamW steps, and weights travel back (1/world of the Newton-Schulz products each;
the communication of "distributed Muon", Liu et al. 2025, arXiv:2502.16982). With ddp nothing travels there; the updated
weights travel while AdamW steps.

ZeRO's name for this is stage 1 with ddp, 3 with fsdp (Rajbhandari et al., arXiv:1910.02054).
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
    """A tensor that this rank steps: some rows of what it holds of a parameter."""

    index: int  # of the parameter, counted over all groups as torch does
    p: nn.Parameter
    low: int  # rows of local(p)
    high: int
    tensor: Tensor  # those rows; a view


@dataclass
class Matrix:
    """One whole matrix that Muon steps, at its owner."""

    index: int  # of its parameter
    number: int  # which of those stacked in it
    p: nn.Parameter
    rows: tuple[int, int]  # of the whole parameter
    columns: int
    owner: int  # rank in the group that shares it out
    tensor: Any = None  # a Tensor at the owner: a view of the parameter with ddp, else a copy


class ShardedOptimizer:
    """Steps `optimizer`, made over the parallelized model, share by share. It has no state yet, and is taken over.

    model, called: what `parallelize` was given and returned; shapes: `whole_shapes(model)` of before.
    `param_groups` are the optimizer's own, so a schedule works on them as ever; the tensors in them are this rank's.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, called: nn.Module, shapes: dict[str, torch.Size],
        config: GPTConfig, team: Team,
    ) -> None:  # fmt: skip
        self.optimizer, self.called, self.team, self.config, self.shapes = optimizer, called, team, config, shapes
        self.param_groups = optimizer.param_groups
        # Kept here, because between forward and backward the model shows FSDP's gathered weights in their place.
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
        """The ranks over which state is shared out, and their group: all with ddp, else those of one replica."""
        team = self.team
        if team.replicas == 1 or self.replicated:
            return list(range(team.size)), dist.group.WORLD
        each = team.shards * team.tensor
        groups = [list(range(first, first + each)) for first in range(0, team.size, each)]
        made = [dist.new_group(ranks) for ranks in groups]  # every rank makes every group
        mine = team.rank // each
        return groups[mine], made[mine]

    def _share_of(self, index: int, p: nn.Parameter) -> list[Share]:
        held = local(p)
        low, high = chunk(len(held), len(self.members), self.me) if self.replicated else (0, len(held))
        return [Share(index, p, low, high, held[low:high])] if high > low else []

    def _matrices_of(self, index: int, p: nn.Parameter) -> list[Matrix]:
        name, matrices, row = self.names[index], [], 0
        for number, rows in enumerate(stacked_rows(name, self.shapes[name], self.config)):
            matrices.append(Matrix(index, number, p, (row, row + rows), self.shapes[name][1], -1))
            row += rows
        return matrices

    def _choose_owners(self) -> None:
        """The largest first, each to the rank with the least to do so far; the same on every rank."""
        load = [0.0] * len(self.members)
        for matrix in sorted(self.matrices, key=lambda m: -_work(m)):
            matrix.owner = min(range(len(load)), key=load.__getitem__)
            load[matrix.owner] += _work(matrix)

    @property
    def owned(self) -> list[Matrix]:
        return [matrix for matrix in self.matrices if matrix.owner == self.me]

    def _take_over(self) -> None:
        """Puts this rank's tensors in place of the parameters."""
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
        """One update from the gradients of the model's parameters, complete on every rank."""
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
        """Steps those that have a gradient, and drops it; the optimizer leaves the others alone."""
        self.optimizer.step()
        for tensor in tensors:
            tensor.grad = None

    def sync_gradients(self, needed: bool) -> None:
        """Whether the next backward pass sums gradients over the ranks; all but the last of an update need not."""
        if isinstance(self.called, DistributedDataParallel):
            self.called.require_backward_grad_sync = needed
        else:
            self.called.set_requires_gradient_sync(needed)  # type: ignore[operator]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters:
            p.grad = None

    def gradients(self) -> list[Tensor]:
        """What this rank holds of the gradients."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]

    def grad_norm(self) -> Tensor:
        """The joint 2-norm () of all gradients over all ranks, the same on every rank."""
        copies = [count for count, p in zip(self._copies, self.parameters, strict=True) if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(self.gradients())).square()
        total = (squares / torch.tensor(copies, device=squares.device)).sum()
        if not self.replicated:
            dist.all_reduce(total, group=self.group)
        return total.sqrt()

    @property
    def found_inf(self) -> Tensor | None:
        """See gptfast.optim: () fp32, 1 where the step is refused."""
        return self.optimizer.found_inf  # type: ignore[attr-defined]

    @found_inf.setter
    def found_inf(self, refused: Tensor | None) -> None:
        self.optimizer.found_inf = refused  # type: ignore[attr-defined]

    def _count_copies(self, name: str) -> int:
        """How many of the sharing ranks hold the same elements of a parameter's gradient."""
        if self.replicated:
            return 1
        held = sum(math.prod(r.size) for rank in self.members for r in self.rectangles(name, rank))
        return held // self.shapes[name].numel()

    def rectangles(self, name: str, rank: int) -> list[Rectangle]:
        return rectangles(name, self.shapes[name], self.config, self.team, rank)

    # ---- communication

    def _matrix_views(self) -> list[list[Tensor]]:
        """The matrices of each rank, as views of this rank's weights (ddp)."""
        return [
            [local(m.p)[slice(*m.rows)] for m in self.matrices if m.owner == rank]
            for rank in range(len(self.members))
        ]  # fmt: skip

    def _share_views(self) -> list[list[Tensor]]:
        """The shares of each rank, as views of this rank's weights (ddp)."""
        stepped = {id(matrix.p) for matrix in self.matrices}
        held = [local(p) for p in self.parameters if id(p) not in stepped]
        ways = len(self.members)
        return [[tensor[slice(*chunk(len(tensor), ways, rank))] for tensor in held] for rank in range(ways)]

    def _spread(self, views: list[list[Tensor]]) -> Callable[[], None]:
        """Sends this rank's views to all, and takes theirs; returns what waits for it and writes them."""
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
        """`_parts_here[owner]`: this rank's parts of an owner's matrices; `_parts_there[rank]`: a rank's of ours."""

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
        """Sends `outgoing[rank]` to each rank; returns what waits for `incoming[rank]` from each and writes it."""
        like = local(self.parameters[0])
        flat = [tensor.reshape(-1) for mine in outgoing for tensor in mine]
        sent = torch.cat(flat) if flat else like.new_empty(0)
        given, taken = ([sum(tensor.numel() for tensor in mine) for mine in side] for side in (outgoing, incoming))
        received = like.new_empty(sum(taken))
        work = dist.all_to_all_single(received, sent, taken, given, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            targets = [tensor for mine in incoming for tensor in mine]
            for target, values in zip(targets, received.split([t.numel() for t in targets]), strict=True):
                target.copy_(values.view_as(target))

        return finish

    def _gather_matrices(self, held: Callable[[Matrix], Tensor]) -> Callable[[], list[Tensor]]:
        """Sends what this rank holds of each matrix to its owner; returns what waits for those that it owns."""
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
        """Sends each rank its parts of the matrices that this one owns; takes its own from their owners."""
        if self.matrices:
            outgoing = [[r.of_whole(m.tensor) for m, r in parts] for parts in self._parts_there]
            self._exchange(outgoing, [[r.of_local(local(m.p)) for m, r in parts] for parts in self._parts_here])()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the owners' copies of the matrices from the weights; needed when these were set from outside."""
        if self.replicated:
            for matrix in self.owned:
                matrix.tensor = local(matrix.p)[slice(*matrix.rows)] if matrix.tensor is None else matrix.tensor
        else:
            for matrix, whole in zip(self.owned, self._gather_matrices(lambda m: local(m.p))(), strict=True):
                matrix.tensor = whole if matrix.tensor is None else matrix.tensor.copy_(whole)

    # ---- state, in the terms of the whole model

    def state_bytes(self) -> int:
        """Of this rank's optimizer state."""
        return sum(t.nbytes for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t))

    def pieces(self) -> Iterator[tuple[int, str, Rectangle, Tensor]]:
        """This rank's state: (parameter, key, where in the whole matrix, its part). Single numbers are left out."""
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
        """The rectangles of a share, and the rows of `value` (shaped like it) for each."""
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
        """The state_dict of the whole model's optimizer, of the state only the steps that AdamW counts."""
        groups, index = [], 0
        for group, rows, count in zip(self.param_groups, self._whole_rows, self._group_sizes, strict=True):
            groups.append({**group, **rows, "params": list(range(index, index + count))})
            index += count
        steps = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        of_muon = {matrix.index for matrix in self.matrices}
        counted = range(index) if steps else []
        return {"state": {i: {"step": steps[0].clone()} for i in counted if i not in of_muon}, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes this rank's part of the state_dict of an optimizer over the whole model."""
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
                if value.dim() == 1:  # a number for each line of each matrix
                    lines = [max(count, m.columns) for count in lines]
                state[key] = value.split(lines)[m.number].to(m.tensor.device, copy=True)
            if state:
                self.optimizer.state[m.tensor] = state
        self.refresh()


def _work(matrix: Matrix) -> float:
    """The products of Newton-Schulz, up to a factor."""
    m, n = matrix.rows[1] - matrix.rows[0], matrix.columns
    return float(m * n * min(m, n))

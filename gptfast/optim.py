"""The optimizers: AdamW in nanoGPT's two groups, and Muon for matrices with AdamW for the rest. Also gradient norms.

No step waits for the device, and each can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import unwrap
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_

from gptfast.config import GPTConfig
from gptfast.runtime import compute_dtype
from kernels.newton_schulz import newton_schulz_reference

Shape = tuple[int, ...]
Tensors = list[Tensor] | tuple[Tensor, ...]

_FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


class _Plain(torch.optim.Optimizer):
    """Base of the optimizers. It avoids torch.optim's import of torch's compiler, which costs two seconds at start.

    The device can refuse a step: while `found_inf` (() fp32, torch's name) holds 1, a step changes neither weights nor
    state, whatever the gradients are, and without the host's knowledge.
    """

    found_inf: Tensor | None = None

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    _state_dict = unwrap(torch.optim.Optimizer.state_dict)
    _load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)

    def make_capturable(self) -> None:
        """Keeps scheduled hyperparameters as tensors on the device, so that a CUDA graph of a step sees new values."""
        for group in self.param_groups:
            device = group["params"][0].device
            for key in SCHEDULED & group.keys():
                scheduled = key == "lr" or (group.get("kind") == "muon" and group[key] != 0.0)
                if scheduled and not isinstance(group[key], Tensor):
                    group[key] = torch.tensor(float(group[key]), device=device)
            group["capturable"] = True
        self._warned_capturable_if_run_uncaptured = True  # silences torch's warning about the warm-up

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state_dict, with plain numbers where `make_capturable` keeps tensors."""
        state = self._state_dict()
        for group in state["param_groups"]:
            for key in SCHEDULED & group.keys():
                group[key] = float(group[key])
            if "capturable" in group:
                group["capturable"] = False
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the result of `state_dict`; hyperparameters that are tensors stay so, and how to run stays as it is.

        Raises ValueError, with nothing loaded, for hyperparameters of other types and states of other shapes.
        """
        capturable = any(group.get("capturable") for group in self.param_groups)
        groups = [
            _checked_group(own, theirs)
            for own, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        for own, theirs in zip(self.param_groups, groups, strict=True):
            for p, index in zip(own["params"], theirs["params"], strict=True):
                _check_state(theirs | {"params": own["params"]}, p, state_dict["state"].get(index) or {})
        self._load_state_dict({"state": state_dict["state"], "param_groups": groups})
        if capturable:
            self.make_capturable()


# of a parameter group: what says how to run a step, or of what shapes, which the run decides and no checkpoint
OF_THE_RUN = ("fused", "foreach", "capturable", "differentiable", "maximize", "amsgrad", "kind", "rows")


def _checked_group(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the saved group, completed by what `own` alone knows. Raises ValueError for a value of another kind."""
    for key, value in own.items():
        if key in saved and key not in ("params", *OF_THE_RUN) and not _alike(saved[key], value):
            raise ValueError(f"{key} of a group of parameters is {str(saved[key])[:80]}, where this run has {value}")
    return own | saved | {key: own[key] for key in OF_THE_RUN if key in own}


def _alike(saved: Any, own: Any) -> bool:
    """Returns whether both are a finite number, or of one type, and if they are lists of one length."""
    numbers = [isinstance(value, int | float | Tensor) and not isinstance(value, bool) for value in (saved, own)]
    if all(numbers):
        return math.isfinite(float(saved))
    if isinstance(own, list | tuple):
        return isinstance(saved, list | tuple) and len(saved) == len(own) and all(map(_alike, saved, own))
    return type(saved) is type(own)


def _check_state(group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
    """Raises ValueError for the state of a parameter, if there is one, with a tensor missing or of another shape."""
    if group.get("kind") == "muon":
        rows = group["rows"][next(i for i, each in enumerate(group["params"]) if each is p)]
        expected = {key: t.shape for key, t in _matrix_state(p, rows, group["normalize"]).items()}
    else:
        expected = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
    for key, shape in expected.items() if state else ():
        value = state.get(key)
        if not (isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()):
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)[:80]
            raise ValueError(f"{key} of a parameter of shape {tuple(p.shape)} is {found}")


SCHEDULED = frozenset({"lr", "weight_decay", "momentum"})  # hyperparameters that a schedule may change


def set_scheduled(group: dict[str, Any], key: str, value: float) -> None:
    """Sets one of SCHEDULED in a parameter group, in place on the device where a CUDA graph reads it."""
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    elif group.get("capturable") and group[key] != value:
        raise RuntimeError(f"{key} of a captured step cannot change from {group[key]} to {value}; leave capture out")
    else:
        group[key] = value


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Sets every group's rate to `rate`, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        set_scheduled(group, "lr", rate * group.get("lr_scale", 1.0))


class AdamW(_Plain, torch.optim.AdamW):
    """torch.optim.AdamW, whose step is not differentiable."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def adamw(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Returns AdamW over the trainable parameters; those with two or more axes decay, biases and gains do not.

    One fused kernel updates all parameters where the device has it. Prints both groups, as nanoGPT does.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() >= 2]
    plain = [p for p in parameters if p.dim() < 2]
    for name, group in (("decayed", decayed), ("non-decayed", plain)):
        print(f"num {name} parameter tensors: {len(group)}, with {sum(p.numel() for p in group):,} parameters")
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
    print(f"using fused AdamW: {fused}")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=fused)


def grad_norm(gradients: list[Tensor]) -> Tensor:
    """Returns the joint 2-norm () of gradients, in a few calls for all of them."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Returns the factor () that clips gradients with that norm to at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


# ---- Muon ------------------------------------------------------------------------------------------------------
class Muon(_Plain):
    """Muon for weight matrices, AdamW for all else (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    A group with kind="muon" holds matrices. One step of a matrix W (m, n) with gradient G:

        M = lerp(M, G, 1 - momentum)                                       M: running mean of gradients
        O = newton_schulz(lerp(G, M, momentum) if nesterov else M)
        with equalize, nanochat's: first scales the rows of newton_schulz's input to their root mean square norm, and
            then O to the norm of an orthogonal matrix, sqrt(min(m, n))
        with normalize, NorMuon (Li et al. 2025, https://arxiv.org/abs/2510.05491), for each row, or column if more
            V = lerp(V, mean of O² over it, 1 - beta2)               V: running mean of squares, m or n numbers
            O = O / sqrt(V), then scaled back to its norm before
        D = W where O and W have one sign, else 0, with cautious (Chen et al. 2025, https://arxiv.org/abs/2510.12402)
        W = W - lr weight_decay D - lr sqrt(max(1, m / n)) O               D is W without cautious

    That is KellerJordan's rule. nanochat decays by lr sqrt(max(1, m / n)) too: with decay_by_shape.

    Matrices of one shape or its transpose, of all layers, are stacked and orthogonalized together, so that a step is a
    handful of batched products. For a parameter that stacks several matrices (queries, keys and values in c_attn), the
    group's `rows` lists their row counts, and each is orthogonalized alone.

    Momentum, rate and decay may be tensors on the device, as `make_capturable` leaves them.

    A group with kind="adamw" holds any parameters, and steps as torch.optim.AdamW does. Parameters without a gradient
    are skipped. The state is plain tensors per parameter: "momentum" and with normalize "square", or "step", "exp_avg"
    and "exp_avg_sq".

    newton_schulz: (stack (B, m, n), steps) -> (B, m, n), the op or its reference. dtype: what it computes in; None is
    bfloat16 where the device has units for it, else the dtype from `gptfast.runtime.compute_dtype`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        newton_schulz: Callable[[Tensor, int], Tensor] = newton_schulz_reference,
        dtype: torch.dtype | None = None,
    ) -> None:
        for group in groups:
            kind = group.get("kind")
            if kind not in _MUON_DEFAULTS:
                raise ValueError(f"kind of a parameter group must be one of {', '.join(_MUON_DEFAULTS)}, not {kind}")
            for key, default in _MUON_DEFAULTS[kind].items():
                group.setdefault(key, default)
            group["params"] = list(group["params"])
            if kind == "muon":
                group["rows"] = group["rows"] or [[p.shape[0]] for p in group["params"]]
                for p, rows in zip(group["params"], group["rows"], strict=True):
                    if p.ndim != 2 or sum(rows) != p.shape[0]:
                        raise ValueError(f"kind='muon': {rows} rows of a matrix, not a parameter {tuple(p.shape)}")
        super().__init__(groups, {})
        self.newton_schulz, self.dtype = newton_schulz, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no line search here: nobody passes a closure
        """Makes one step of every group from the parameters' gradients."""
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._step_matrices(group)
            else:
                self._step_adamw(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        moved = [(p, rows) for p, rows in zip(group["params"], group["rows"], strict=True) if p.grad is not None]
        if not moved:
            return
        params = [p for p, _ in moved]
        states = [self._state(p, **_matrix_state(p, rows, group["normalize"])) for p, rows in moved]
        means = [state["momentum"] for state in states]
        grads, rate, decay, allowed = [p.grad for p in params], group["lr"], group["weight_decay"], None
        if self.found_inf is not None:  # if refused, the momentum is lerped to itself and the rate is 0
            allowed = 1.0 - self.found_inf
            grads = [torch.where(allowed > 0, grad, mean) for grad, mean in zip(grads, means, strict=True)]
            rate = rate * allowed
        _lerp_(means, grads, 1 - group["momentum"])
        updates = _lerp(grads, means, group["momentum"]) if group["nesterov"] else means
        decays = isinstance(decay, Tensor) or decay != 0.0
        decay = rate * decay
        by_shape = group.get("decay_by_shape", False)  # not in the checkpoints of older versions
        if decays and not (group["cautious"] or by_shape):
            torch._foreach_mul_(params, 1 - decay)

        stacks: dict[Shape, list[tuple[Tensor, Tensor, Tensor]]] = {}  # (m, n) -> (weights, update, square) of each
        for (p, rows), update, state in zip(moved, updates, states, strict=True):
            squares = _lines(state["square"], rows, p.shape[1]) if group["normalize"] else p.split(rows)
            for matrix, its_update, square in zip(p.split(rows), update.split(rows), squares, strict=True):
                stacks.setdefault(tuple(matrix.shape), []).append((matrix, its_update, square))
        fresh = {shape: [update for _, update, _ in triples] for shape, triples in stacks.items()}
        directions = self._orthogonalized(fresh, group["steps"], group.get("equalize", False))
        for (m, n), triples in stacks.items():
            matrices, _, squares = zip(*triples, strict=True)
            scale = max(1.0, m / n) ** 0.5
            its_decay = decay * scale if by_shape else decay
            direction = directions[m, n].to(matrices[0].dtype)
            if group["normalize"]:
                direction = _even_out(direction, squares, group["beta2"], allowed)
            if decays and group["cautious"]:
                weights = torch.stack(matrices)
                _subtract_(matrices, weights * (weights * direction > 0), its_decay)
            elif decays and by_shape:
                torch._foreach_mul_(matrices, 1 - its_decay)
            _subtract_(matrices, direction, rate * scale)

    def _orthogonalized(
        self, updates: dict[Shape, list[Tensor]], steps: int, equalize: bool = False
    ) -> dict[Shape, Tensor]:
        """Returns for each shape (m, n) the orthogonalized updates (B, m, n); (n, m) joins (m, n), transposed."""
        directions: dict[Shape, Tensor] = {}
        for (m, n), upright in updates.items():
            if (m, n) in directions:
                continue
            turned = updates.get((n, m), []) if m != n else []
            stack = torch.stack([*upright, *(u.mT for u in turned)])
            if equalize:
                stack = torch.cat((_equal_lines(stack[: len(upright)], -1), _equal_lines(stack[len(upright) :], -2)))
            update = self.newton_schulz(stack.to(self.dtype or compute_dtype(stack.device.type)[0]), steps)
            if equalize:
                update = update.to(torch.promote_types(update.dtype, torch.float32))
                norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
                update = update * (min(m, n) ** 0.5 / norm.clamp(min=1e-10))
            directions[m, n] = update[: len(upright)]
            if turned:
                directions[n, m] = update[len(upright) :].mT.contiguous()
        return directions

    def _step_adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        states = [self._state(p, step=torch.zeros((), device=p.device), exp_avg=p, exp_avg_sq=p) for p in params]
        beta1, beta2 = group["betas"]
        adamw_(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=group["fused"], amsgrad=False, beta1=beta1, beta2=beta2, found_inf=self.found_inf,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip

    def _state(self, p: Tensor, **like: Tensor) -> dict[str, Tensor]:
        """Returns the state of a parameter; at its first step, zeros shaped like the given tensors."""
        state = self.state[p]
        if not state:
            state.update({key: torch.zeros_like(t) for key, t in like.items()})
        return state


def _matrix_state(p: Tensor, rows: list[int], normalize: bool) -> dict[str, Tensor]:
    """Returns tensors shaped like a parameter's Muon state; NorMuon's has one number per line of each matrix."""
    lines = sum(max(m, p.shape[1]) for m in rows)
    return {"momentum": p} | ({"square": p.new_empty(lines)} if normalize else {})


def _lines(square: Tensor, rows: list[int], n: int) -> list[Tensor]:
    """Returns views of the running squares of each matrix (m, n) in a parameter: (m, 1), or (1, n) if n > m."""
    parts = square.split([max(m, n) for m in rows])
    return [part.unsqueeze(1 if m >= n else 0) for m, part in zip(rows, parts, strict=True)]


def _lerp(starts: list[Tensor], targets: list[Tensor], weight: float | Tensor) -> list[Tensor]:
    """Interpolates each tensor by `weight` towards its target; the host does not read a weight on the device."""
    return list(torch._foreach_lerp(starts, targets, [weight] * len(starts) if isinstance(weight, Tensor) else weight))


def _lerp_(moved: Tensors, targets: Tensors, weight: float | Tensor) -> None:
    """Does `_lerp` in place."""
    if isinstance(weight, Tensor):
        torch._foreach_lerp_(moved, targets, [weight] * len(moved))
    else:
        torch._foreach_lerp_(moved, targets, weight)


def _subtract_(matrices: tuple[Tensor, ...], stack: Tensor, factor: float | Tensor) -> None:
    """Subtracts factor * stack (B, m, n) from B matrices, in place."""
    if isinstance(factor, Tensor):
        torch._foreach_sub_(matrices, (stack * factor).unbind())
    else:
        torch._foreach_sub_(matrices, stack.unbind(), alpha=factor)


def _equal_lines(stack: Tensor, axis: int) -> Tensor:
    """Scales every line of stack (B, m, n) along `axis` to the root mean square of its matrix's line norms."""
    norms = torch.linalg.vector_norm(stack, dim=axis, keepdim=True)
    other_axis = -3 - axis  # of -1 and -2
    return stack * (norms.square().mean(other_axis, keepdim=True).sqrt() / norms.clamp(min=1e-6))


def _even_out(direction: Tensor, squares: tuple[Tensor, ...], beta2: float, allowed: Tensor | None) -> Tensor:
    """Divides the lines of direction (B, m, n) by their running size, keeps its norm, and updates `squares` in place.

    Where `allowed` is 0, `squares` stay as they are.
    """
    axis = -1 if direction.shape[-2] >= direction.shape[-1] else -2
    fresh = direction.square().mean(axis, keepdim=True)
    _lerp_(squares, fresh.unbind(), 1 - beta2 if allowed is None else (1 - beta2) * allowed)
    scaled = direction * torch.stack(squares).clamp(min=1e-10).rsqrt()
    norm, new_norm = (torch.linalg.vector_norm(d, dim=(-2, -1), keepdim=True) for d in (direction, scaled))
    return scaled * (norm / new_norm.clamp(min=1e-10))


_MUON_DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": {
        "lr": 0.02,
        "momentum": 0.95,
        "nesterov": True,
        "weight_decay": 0.0,
        "cautious": False,  # decay a weight only where the update shrinks it too
        "decay_by_shape": False,  # the decay of a tall matrix grows as its update does
        "equalize": False,  # rows of one norm before, the norm of an orthogonal matrix after
        "normalize": False,  # NorMuon
        "beta2": 0.95,  # of NorMuon
        "steps": 5,
        "rows": None,
    },
    "adamw": {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "fused": True},
}


@dataclass(frozen=True)
class AdamWRule:
    """How AdamW steps the parameters of one role, beside Muon."""

    rate: Literal["embedding_lr", "head_lr", "scalar_lr", "fixed"]  # which of muon()'s rates; fixed: 1
    factor: float = 1.0  # of that rate
    betas: tuple[float, float] | None = None  # None: those of muon()
    weight_decay: float = 0.0


_PLAIN = {
    "embeddings": AdamWRule("embedding_lr"),
    "head": AdamWRule("head_lr"),
    "scalars": AdamWRule("scalar_lr"),
    "value embeddings": AdamWRule("embedding_lr"),
    "resid_lambdas": AdamWRule("scalar_lr"),
    "x0_lambdas": AdamWRule("scalar_lr"),
    "smear, backout": AdamWRule("scalar_lr"),
}
# nanochat, gpt.py, setup_optimizer (github.com/karpathy/nanochat at 92d63d4): its scalar_lr is 0.5 by default.
_NANOCHAT = _PLAIN | {
    "head": AdamWRule("head_lr", 1.0, (0.8, 0.96), 0.01),
    "embeddings": AdamWRule("embedding_lr", 1.0, (0.8, 0.995), 0.001),
    "value embeddings": AdamWRule("embedding_lr", 0.5, (0.8, 0.995), 0.01),
    "resid_lambdas": AdamWRule("scalar_lr", 0.01, (0.8, 0.95), 0.05),
    "x0_lambdas": AdamWRule("scalar_lr", 1.0, (0.96, 0.95), 0.0),
    "smear, backout": AdamWRule("fixed", 0.2, (0.8, 0.95), 0.0),
}
RULES: dict[str, dict[str, AdamWRule]] = {"plain": _PLAIN, "nanochat": _NANOCHAT}


def role_of(name: str, p: Tensor) -> str:
    """Returns a parameter's role for the optimizer: "matrices", or one of the roles in RULES."""
    if name in ("resid_lambdas", "x0_lambdas"):
        return name
    if name.startswith("smear_") or name == "backout_lambda":
        return "smear, backout"
    if name.startswith("value_embeds."):
        return "value embeddings"
    if p.ndim < 2 or "shift" in name:
        return "scalars"
    if name.endswith(("wte.weight", "wpe.weight")):
        return "embeddings"
    return "head" if name.endswith("lm_head.weight") else "matrices"


def muon(
    model: nn.Module,
    config: GPTConfig,
    *,
    matrix_lr: float = 0.05,
    embedding_lr: float = 0.15,
    head_lr: float = 0.02,
    scalar_lr: float = 0.06,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.8, 0.95),
    weight_decay: float = 0.0,
    cautious: bool = False,
    decay_by_shape: bool = False,
    equalize: bool = False,
    normalize: bool = False,
    normalize_beta2: float = 0.95,
    steps: int = 5,
    matrix_kind: str = "muon",
    rules: str = "plain",
    newton_schulz: Callable[[Tensor, int], Tensor] = newton_schulz_reference,
) -> Muon:
    """Returns Muon for the blocks' matrices, with AdamW for embeddings, head, gains, biases, token shifts and scalars.

    With matrix_kind="adamw" the matrices use AdamW too, at `matrix_lr`, to measure the gain from Muon. `rules` selects
    an entry of RULES for the other parameters.

    A tied head steps with the embeddings; empty groups are left out. `groups_table(optimizer)` shows the groups.
    Every group's rate is stored as its `lr_scale`, so that a schedule multiplies all by one factor.
    """
    roles, rows = _roles(model, config, rules)
    adamw_settings = {"kind": "adamw", "betas": betas, "eps": 1e-10}
    rule = adamw_settings | {"kind": matrix_kind, "weight_decay": weight_decay}
    if matrix_kind == "muon":
        rule = {
            "kind": "muon",
            "rows": rows,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "cautious": cautious,
            "decay_by_shape": decay_by_shape,
            "equalize": equalize,
            "normalize": normalize,
            "beta2": normalize_beta2,
            "steps": steps,
        }
    groups = [{"name": "matrices", "params": roles.pop("matrices"), "lr": matrix_lr} | rule]
    rates = {"embedding_lr": embedding_lr, "head_lr": head_lr, "scalar_lr": scalar_lr, "fixed": 1.0}
    for role, params in roles.items():
        its = RULES[rules][role]
        own = {"betas": its.betas or betas, "weight_decay": its.weight_decay, "lr": rates[its.rate] * its.factor}
        groups.append({"name": role, "params": params} | adamw_settings | own)
    for group in groups:
        group["lr_scale"] = group["lr"]
    return Muon([group for group in groups if group["params"]], newton_schulz)


def _roles(model: nn.Module, config: GPTConfig, rules: str) -> tuple[dict[str, list[nn.Parameter]], list[list[int]]]:
    """Returns the parameters of each role; and of each matrix the rows of the matrices that are stacked in it."""
    qkv_rows = [heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    roles: dict[str, list[nn.Parameter]] = {"matrices": [], **{role: [] for role in RULES[rules]}}
    rows = []
    for name, p in model.named_parameters():  # a tied weight comes once, as the embedding
        role = role_of(name, p)
        roles[role].append(p)
        if role == "matrices":
            rows.append(qkv_rows if name.endswith("c_attn.weight") else [p.shape[0]])
    return roles, rows


def groups_table(optimizer: torch.optim.Optimizer) -> str:
    """Returns one line per group: its parameters and how they are stepped."""
    lines = [f"{'group':<18}{'rule':<8}{'tensors':>8}{'numbers':>13}{'lr':>10}{'decay':>8}"]
    for i, group in enumerate(optimizer.param_groups):
        numbers = sum(p.numel() for p in group["params"])
        rule = group.get("kind", type(optimizer).__name__.lower())
        lines.append(
            f"{group.get('name', i):<18}{rule:<8}{len(group['params']):>8}{numbers:>13,}"
            f"{group['lr']:>10g}{group['weight_decay']:>8g}"
        )
    return "\n".join(lines)

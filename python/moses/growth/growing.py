"""`GrowingLayer`: a mixture of FFN experts that grows: what was learned is frozen in buffers, what is being learned stands beside it.

T tokens, E experts = frozen ones, then free ones, k experts a token, D model width, F expert width, V token ids.

Frozen is a buffer, never a masked gradient: no optimizer, decay or momentum can reach it. The model as it was before a growth is the same weights
with the later experts out of sight (Lifelong-MoE, Chen et al., arXiv 2305.12281): routes then name the first E' experts alone, and everything that
is computed is, in values and in shapes, what was computed then.

Two ways to route:
    learned   top-k of a gate of one row an expert, in float32; ties to the lower id. The weights are the softmax over the k chosen logits (which
              is the softmax over all, divided by the k's sum, and does not depend on experts that are not chosen), or, where not `normalise`, the
              softmax over all visible experts.
    random    by token id and domain, through a table that was drawn once: PanGu-Σ (Ren et al., arXiv 2303.10845, section 3.3). No gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import DispatchError, SurgeryError
from ..experts import compute_dtype
from ..loss import balance_loss
from ..ops import combine, gather, grouped_ffn
from ..plan import DispatchPlan, dispatch_plan
from ..routers.finite import no_autocast, router_dtype
from ..routers.gate import gate_logits
from ..routers.topk_of import stable_topk
from ..routes import RouterOutput, Routes, expert_load
from ..surgery.plan import Slot
from .context import GrowthContext
from .slots import slot_rows


class GrowingLayer(nn.Module):
    """Takes the place of a dense FFN, or of a mixture, in a model: (..., D) to (..., D).

    Attributes:
        into, out, gate: the frozen experts (E_frozen, 2F, D) or (E_frozen, F, D), (E_frozen, D, F), and their gate rows (E_frozen, D)
            float32; buffers. `gate` is None where routing is random.
        free_into, free_out, free_gate: the free experts, parameters; None where there are none.
        tables: (domains, V) int16 buffer of expert numbers, a row a domain; only where routing is random.
        shared: a module that every token passes beside its experts; None where there is none.
    """

    into: Tensor
    out: Tensor
    gate: Tensor | None
    tables: Tensor
    free_into: nn.Parameter | None
    free_out: nn.Parameter | None
    free_gate: nn.Parameter | None

    def __init__(
        self,
        into: Tensor,
        out: Tensor,
        gate: Tensor | None,
        *,
        path: str = "layer",
        context: GrowthContext | None = None,
        top_k: int = 2,
        activation: str = "silu",
        gated: bool = True,
        normalise: bool = True,
        balance_weight: float = 0.01,
        shared: nn.Module | None = None,
        shared_gate: nn.Module | None = None,
        vocab_size: int = 0,
    ) -> None:
        """Start from the experts that are there, which are frozen.

        Args:
            into, out, gate: as the attributes; copied. No gate: random routing of `vocab_size` token ids.
            path: of the layer in the model; the layer's name in `context` and in messages.
            context: shared by a model's layers.
            top_k: k; with fewer visible experts a token uses all of them.
            activation, gated: of `moses.ops.grouped_ffn`.
            normalise: whether the k weights sum to 1.
            balance_weight: of the loss E·Σ f_i P_i (Switch, arXiv 2101.03961) in the router's output.
            shared, shared_gate: Qwen2-MoE's shared expert, and the gate (D to 1) whose sigmoid scales it.
        """
        super().__init__()
        self.path, self.context = path, GrowthContext() if context is None else context
        self.top_k, self.activation, self.gated, self.normalise = top_k, activation, gated, normalise
        self.balance_weight, self.shared, self.shared_gate = balance_weight, shared, shared_gate
        self.register_buffer("into", into.detach().clone())
        self.register_buffer("out", out.detach().clone())
        self.register_buffer("gate", None if gate is None else gate.detach().clone().to(router_dtype(gate)))
        tables = torch.zeros((0, vocab_size), dtype=torch.int16, device=into.device)
        self.register_buffer("tables", tables if gate is None else None)
        for name in ("free_into", "free_out", "free_gate"):
            self.register_parameter(name, None)

    # -- experts -------------------------------------------------------------------------------------------------------

    @property
    def num_frozen(self) -> int:
        """Experts in buffers."""
        return int(self.into.shape[0])

    @property
    def num_free(self) -> int:
        """Experts in parameters."""
        return 0 if self.free_into is None else int(self.free_into.shape[0])

    @property
    def num_experts(self) -> int:
        """E."""
        return self.num_frozen + self.num_free

    @property
    def num_visible(self) -> int:
        """Experts that routes may name now."""
        asked = (self.context.visible or {}).get(self.path)
        return self.num_experts if asked is None else min(asked, self.num_experts)

    @contextmanager
    def visible(self, num_experts: int) -> Iterator[None]:
        """Inside the with block, the layer as it was when it had `num_experts` experts."""
        if not 1 <= num_experts <= self.num_experts:
            raise SurgeryError(
                f"{self.path}: has 1 to {self.num_experts} experts, not {num_experts}", code="unknown_expert"
            )
        before = self.context.visible
        self.context.visible = {**(before or {}), self.path: num_experts}
        try:
            yield
        finally:
            self.context.visible = before

    def expert_tensors(self) -> dict[str, Tensor]:
        """All experts' tensors by the name of the buffer, frozen ones first; detached, new where there are free ones."""
        return {name: part.detach() for name, part in self._joined().items()}

    def grow(self, slots: Sequence[Slot], *seed: object) -> None:
        """Add free experts behind those that are there; `seed` names what noise and fresh experts are drawn from.

        Raises:
            SurgeryError: `unknown_expert`: a source that is not there; `bad_plan`: a slot that is not new.
        """
        for slot in slots:
            unknown = [source for source in slot.sources if source >= self.num_experts]
            if unknown:
                raise SurgeryError(
                    f"{self.path}: has experts 0 to {self.num_experts - 1}, not {unknown[0]}", code="unknown_expert"
                )
            if not slot.new:
                raise SurgeryError(
                    f"{self.path}: expert {slot} is there already; only new ones are added", code="bad_plan"
                )
        added = {name: slot_rows(part, slots, *seed, name) for name, part in self.expert_tensors().items()}
        for name, rows in added.items():
            before = getattr(self, f"free_{name}")
            whole = rows if before is None else torch.cat([before.detach(), rows])
            setattr(self, f"free_{name}", nn.Parameter(whole))

    def freeze(self) -> None:
        """Make the free experts frozen ones, bit for bit."""
        for name, whole in self.expert_tensors().items():
            setattr(self, name, whole)
            setattr(self, f"free_{name}", None)

    def add_frozen(self, rows: dict[str, Tensor]) -> None:
        """Put experts behind the frozen ones: tensors by the name of the buffer. There must be no free ones."""
        assert not self.num_free
        for name in self._names():
            mine = getattr(self, name)
            setattr(self, name, torch.cat([mine, rows[name].to(mine.device, mine.dtype)]))

    def keep(self, experts: Sequence[int]) -> None:
        """Leave these frozen experts alone, in that order. There must be no free ones."""
        assert not self.num_free
        for name in self._names():
            setattr(self, name, getattr(self, name)[list(experts)])

    def drop_free(self) -> None:
        """Give the free experts up."""
        for name in self._names():
            setattr(self, f"free_{name}", None)

    def add_table(self, table: Tensor) -> int:
        """Add a domain by its (V,) table of expert numbers; the result is the domain's row."""
        self.tables = torch.cat([self.tables, table.to(self.tables.device, torch.int16)[None]])
        return int(self.tables.shape[0]) - 1

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D) of x's dtype.

        Raises:
            ModelError: the gate's logits are not finite (`router_not_finite`); random routing without the tokens' ids (`token_ids_needed`).
        """
        tokens = x.reshape(-1, x.shape[-1])
        routed = self.route(x)
        if self.context.seen is not None:
            self.context.seen.append((self.path, routed))
        plan = dispatch_plan(routed.routes.expert_ids, self.num_experts)
        y = combine(self.expert_rows(tokens, plan), plan, routed.routes.weights).to(x.dtype)
        if self.shared is not None:
            beside = self.shared(tokens)
            y = y + (beside if self.shared_gate is None else torch.sigmoid(self.shared_gate(tokens)) * beside)
        return y.view(x.shape)

    def route(self, x: Tensor) -> RouterOutput:
        """Routes of (..., D) tokens among the visible experts."""
        with no_autocast(x):
            return self._by_table(x) if self.gate is None else self._by_gate(x.reshape(-1, x.shape[-1]))

    def _by_gate(self, x_TD: Tensor) -> RouterOutput:
        count, dtype = self.num_visible, router_dtype(x_TD)
        weight = self._joined()["gate"][:count].to(dtype)
        logits = gate_logits(x_TD.to(dtype), weight, None, self.path)
        _, ids = stable_topk(logits.detach(), min(self.top_k, count))
        chosen = logits.gather(-1, ids)
        shares = logits.softmax(-1)
        weights = chosen.softmax(-1) if self.normalise else shares.gather(-1, ids)
        load = expert_load(ids, count)
        losses = {"balance": self.balance_weight * balance_loss(shares, load)} if self.balance_weight else {}
        return RouterOutput(Routes(ids, weights), logits, load, losses)

    def _by_table(self, x: Tensor) -> RouterOutput:
        domain = self.context.domain
        if domain < 0:
            ids = torch.zeros((x.numel() // x.shape[-1], 1), dtype=torch.int64, device=x.device)
        elif domain < self.tables.shape[0]:
            ids = self.tables[domain][self.context.ids_of(x, self.path)].long()[:, None]
        else:
            raise DispatchError(f"{self.path} has {self.tables.shape[0]} domains, not {domain}", code="domain_unknown")
        weights = torch.ones(ids.shape, dtype=router_dtype(x), device=ids.device)
        return RouterOutput(Routes(ids, weights), None, expert_load(ids, self.num_experts))

    def expert_rows(self, tokens: Tensor, plan: DispatchPlan) -> Tensor:
        """(P, D): what each expert makes of its tokens, in the plan's order.

        The frozen experts' rows are first. Where there are both kinds, CUDA waits for their number.
        """
        rows = gather(tokens.to(compute_dtype(tokens)), plan)
        dtype, offsets, frozen = rows.dtype, plan.offsets, self.num_frozen
        if self.free_into is None or self.free_out is None:
            return self._ffn(rows, self.into.to(dtype), self.out.to(dtype), offsets)
        border = int(offsets[frozen])
        old = self._ffn(rows[:border], self.into.to(dtype), self.out.to(dtype), offsets[: frozen + 1])
        new = self._ffn(
            rows[border:], self.free_into.to(dtype), self.free_out.to(dtype), offsets[frozen:] - offsets[frozen]
        )
        return torch.cat([old, new])

    def _ffn(self, rows: Tensor, into: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
        return grouped_ffn(rows, into, out, offsets, self.activation, gated=self.gated)

    def _names(self) -> tuple[str, ...]:
        return ("into", "out") if self.gate is None else ("into", "out", "gate")

    def _joined(self) -> dict[str, Tensor]:
        found = {}
        for name in self._names():
            frozen, free = getattr(self, name), getattr(self, f"free_{name}")
            found[name] = frozen if free is None else torch.cat([frozen, free])
        return found

    def extra_repr(self) -> str:
        """Of nn.Module."""
        routing = "random" if self.gate is None else f"top_k={self.top_k}"
        return f"{self.path}, frozen={self.num_frozen}, free={self.num_free}, into={tuple(self.into.shape)}, {routing}"

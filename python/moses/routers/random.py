"""Random routed experts: a domain has a group of experts, a token id has one expert of the group, by a table drawn once.

PanGu-Σ (Ren et al., arXiv 2303.10845), section 3.3: two levels, no learned gate. For token id v of domain d the expert is
table[d][v]. `uniform` draws it uniformly; `balanced` gives every expert of a group, as near as can be, the same share of the domain's
tokens, by token frequencies: the ids go from the most to the least frequent to the expert with the least so far (Graham 1969, longest
processing time first), equal ones to the expert that a random order of the group names first.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DispatchError
from ..routes import RouterOutput, Routes, expert_load
from ..seeds import stable_seed
from .base import whole
from .finite import router_dtype


class RandomRouter(nn.Module):
    """Routes by token id and domain; k = 1, weight 1, no parameters.

    Attributes:
        table: (domains, vocabulary) int64 buffer of expert ids; domain d's are d · experts_per_group and up.
        num_experts: domains · experts_per_group.
    """

    top_k = 1
    table: Tensor

    def __init__(
        self,
        vocab_size: int,
        num_domains: int,
        experts_per_group: int,
        *,
        seed: int = 0,
        layer: str = "",
        frequencies: Sequence[Tensor | None] | None = None,
    ) -> None:
        """`layer` is part of the seed, so that layers are drawn independently; `frequencies`, a (V,) count of token ids a domain,
        balances the table; None, or a None in it, draws uniformly."""
        super().__init__()
        whole(self, vocab_size=vocab_size, num_domains=num_domains, experts_per_group=experts_per_group)
        given = [None] * num_domains if frequencies is None else list(frequencies)
        counts = [f for f in given if f is not None]
        if len(given) != num_domains or any(f.shape != (vocab_size,) or not bool((f >= 0).all()) for f in counts):
            raise ConfigError(
                f"RandomRouter.frequencies must be {num_domains} counts, each of {vocab_size} token ids and none below 0",
                code="bad_setting",
            )
        self.num_experts, self.experts_per_group = num_domains * experts_per_group, experts_per_group
        rows = [
            draw_table(vocab_size, experts_per_group, stable_seed(seed, layer, domain), given[domain])
            + domain * experts_per_group
            for domain in range(num_domains)
        ]
        self.register_buffer("table", torch.stack(rows))

    def forward(self, x: Tensor, token_ids: Tensor, domains: Tensor | int) -> RouterOutput:
        """Route (..., D) tokens by their ids (...) int64 and domains, an int or (...) int64.

        Raises:
            DispatchError: ids or a domain out of the table (`token_unknown`, `domain_unknown`), on the CPU; shapes that do not fit.
        """
        ids = token_ids.reshape(-1)
        # a number is filled in on the device: copying it there would wait for the host
        domain = (
            torch.full_like(ids, domains) if isinstance(domains, int) else domains.expand(token_ids.shape).reshape(-1)
        )
        if ids.shape[0] * x.shape[-1] != x.numel():
            raise DispatchError(
                f"{tuple(token_ids.shape)} token ids for input {tuple(x.shape)}", code="dispatch_arguments"
            )
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            for name, values, size in (("token", ids, self.table.shape[1]), ("domain", domain, self.table.shape[0])):
                bad = (values < 0) | (values >= size)
                if bool(bad.any()):
                    token = int(bad.nonzero()[0])
                    raise DispatchError(
                        f"token {token} has {name} {int(values[token])}; the table has {size}, from 0",
                        code=f"{name}_unknown",
                    )
        experts = self.table[domain, ids][:, None]
        weights = torch.ones(experts.shape, dtype=router_dtype(x), device=experts.device)
        return RouterOutput(Routes(experts, weights), None, expert_load(experts, self.num_experts))


def draw_table(vocab_size: int, num_experts: int, seed: int, frequencies: Tensor | None = None) -> Tensor:
    """(V,) int64 experts of the token ids, in [0, num_experts)."""
    generator = torch.Generator().manual_seed(seed)
    if frequencies is None:
        return torch.randint(num_experts, (vocab_size,), generator=generator)
    # ids of one frequency are dealt in a random order, else neighbours in the vocabulary would go round the experts
    shuffled = torch.randperm(vocab_size, generator=generator)
    order = shuffled[torch.sort(frequencies[shuffled], descending=True, stable=True).indices].tolist()
    names = torch.randperm(num_experts, generator=generator).tolist()
    counts, table = frequencies.tolist(), [0] * vocab_size
    # ids that were never seen add nothing to a load: they go round by the number of ids
    for ids, weigh in (
        ([t for t in order if counts[t]], counts),
        ([t for t in order if not counts[t]], [1] * vocab_size),
    ):
        heap = [(0, place, name) for place, name in enumerate(names)]
        for token in ids:
            load, place, name = heap[0]
            table[token] = name
            heapq.heapreplace(heap, (load + weigh[token], place, name))
    return torch.tensor(table)

"""Mixture of experts: routers that see one group's experts each, the routed experts, the shared expert.

This file travels inside an exported folder; it needs torch and transformers and nothing else.

Tensor names carry their dimensions where it helps: N rows (batch x sequence), K experts per token, C columns
of the joined router.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.generic import maybe_autocast

from .configuration_symbiotic import SymbioticConfig


class SymbioticMLP(nn.Module):
    """Gated MLP: down(act(gate(x)) * up(x)); ``weights`` scale its rows before the down projection."""

    def __init__(self, config: SymbioticConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """rows [..., h], weights [...] -> [..., h]."""
        inner = self.act_fn(self.gate_proj(rows)) * self.up_proj(rows)
        if weights is not None:
            inner = (inner * weights.unsqueeze(-1)).to(rows.dtype)
        return self.down_proj(inner)


class SymbioticGate(nn.Module):
    """The weight of one router: a row for each expert of its group, in ascending order of expert id."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward(self) -> Tensor:
        """The weight [experts, h]: offloading brings it when the module is called, not when it is read."""
        return self.weight


class SymbioticRouter(nn.ModuleDict):
    """Routers by name. Each token's router scores the experts of its own group and no others.

    All routers' weights are joined to C columns; a token's logits outside its own router's columns are -inf
    *before* the score function and top-k, so that a group's result doesn't depend on the other groups.
    """

    def __init__(self, config: SymbioticConfig, layer_idx: int) -> None:
        names = list(config.group_of_router)
        experts = {name: config.experts_of_router(layer_idx, name) for name in names}
        super().__init__({name: SymbioticGate(len(experts[name]), config.hidden_size) for name in names})
        self.top_k = config.num_experts_per_tok
        self.score_function = config.router_score_function
        self.pre_softmax = config.router_pre_softmax
        self.scaling = config.routed_scaling_factor
        self.dtype = getattr(torch, config.router_dtype) if config.router_dtype else None
        self.expert_bias: Tensor | None
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.router_bias else None
        self.register_buffer("expert_bias", bias)
        self._experts = list(experts.values())
        columns = sum(len(members) for members in self._experts)
        self.register_buffer("expert_of_column", torch.empty(columns, dtype=torch.long), persistent=False)
        self.register_buffer("router_of_column", torch.empty(columns, dtype=torch.long), persistent=False)
        self.reset_tables()

    def reset_tables(self) -> None:
        """Fill the index buffers again: they are not in the weight file, and loading starts from an empty model."""
        experts = [expert for members in self._experts for expert in members]
        routers = [router for router, members in enumerate(self._experts) for _ in members]
        init.copy_(self.expert_of_column, torch.tensor(experts))
        init.copy_(self.router_of_column, torch.tensor(routers))

    def joint_logits(self, rows: Tensor, router_ids: Tensor) -> Tensor:
        """Logits [N, C] of rows [N, h] in the router's dtype, -inf outside each row's own router [N]."""
        dtype = self.dtype or rows.dtype
        weight = torch.cat([gate() for gate in self.values()])
        # Under autocast the choice of experts would change with the rounding of its dtype.
        with maybe_autocast(device_type=rows.device.type, enabled=False):
            logits_NC = nn.functional.linear(rows.to(dtype), weight.to(dtype))
        return logits_NC.masked_fill(router_ids.unsqueeze(1) != self.router_of_column, float("-inf"))

    def ranking(self, logits_NC: Tensor) -> Tensor:
        """What the choice of experts goes by, [N, C]: logits, or scores with the bias; -inf stays -inf."""
        if self.expert_bias is None:
            # All score functions grow with the logit: top-k on logits can't be misled by scores that underflow.
            return logits_NC
        ranking_NC = torch.sigmoid(logits_NC.float()) + self.expert_bias[self.expert_of_column]
        return ranking_NC.masked_fill(logits_NC.isneginf(), float("-inf"))

    def forward(self, rows: Tensor, router_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            rows: [N, h].
            router_ids: [N] index of each row's router.

        Returns:
            expert ids [N, K] and their weights [N, K] in the router's dtype.
        """
        logits_NC = self.joint_logits(rows, router_ids)
        if self.score_function == "softmax":
            if self.pre_softmax:
                scores_NC = torch.softmax(logits_NC, dim=-1, dtype=torch.float32)
                weights_NK, columns_NK = torch.topk(scores_NC, self.top_k, dim=-1)
            else:
                chosen_NK, columns_NK = torch.topk(logits_NC, self.top_k, dim=-1)
                weights_NK = torch.softmax(chosen_NK, dim=-1, dtype=torch.float32)
        else:
            columns_NK = torch.topk(self.ranking(logits_NC), self.top_k, dim=-1).indices
            weights_NK = logits_NC.gather(1, columns_NK).float()
            sigmoid = self.score_function == "sigmoid"
            weights_NK = torch.sigmoid(weights_NK) if sigmoid else nn.functional.softplus(weights_NK).sqrt()
            if self.top_k > 1:
                weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        if self.scaling:
            weights_NK = weights_NK * self.scaling
        return self.expert_of_column[columns_NK], weights_NK.to(logits_NC.dtype)


class SymbioticExperts(nn.ModuleList):
    """Routed experts, one MLP each, so that the state dict has one key an expert."""

    def __init__(self, config: SymbioticConfig) -> None:
        super().__init__(SymbioticMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))

    def forward(self, rows: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sum of each row's experts: [N, h]. Rows are sorted by expert, so each expert runs once."""
        order = experts_NK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(experts_NK.reshape(-1), minlength=len(self)).tolist()
        source = order // experts_NK.shape[1]
        row_chunks = rows[source].split(counts)
        weight_chunks = weights_NK.reshape(-1)[order].split(counts)
        outputs = [
            expert(chunk, weights)
            for expert, chunk, weights in zip(self, row_chunks, weight_chunks, strict=True)
            if len(chunk)
        ]
        # Under autocast the experts' dtype is another one.
        return torch.zeros_like(rows).index_add_(0, source, torch.cat(outputs).to(rows.dtype))


class SymbioticMoE(nn.Module):
    """Mixture of experts: routed experts of the token's group plus the shared expert."""

    def __init__(self, config: SymbioticConfig, layer_idx: int) -> None:
        super().__init__()
        self.routers = SymbioticRouter(config, layer_idx)
        self.experts = SymbioticExperts(config)
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = SymbioticMLP(config, config.shared_expert_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor, router_ids: Tensor) -> Tensor:
        """hidden [b, s, h], router_ids [b, s] -> [b, s, h]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        experts_NK, weights_NK = self.routers(rows, router_ids.reshape(-1))
        output = self.experts(rows, experts_NK, weights_NK)
        if self.shared_expert is not None:
            shared = self.shared_expert(rows)
            if self.shared_expert_gate is not None:
                shared = shared * torch.sigmoid(self.shared_expert_gate(rows))
            output = output + shared
        return output.reshape(hidden.shape)

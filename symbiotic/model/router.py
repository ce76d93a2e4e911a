"""The router: each token chooses its top-k among the experts of its own group.

Life of a batch of rows:
 1. ``token_types`` [s, b] say which router serves a row; that router's group is all it can see.
 2. The routers' weights, one Parameter each, are joined in slot order and give logits_NE in one product.
 3. Logits outside a row's group become -inf *before* the score function and top-k, so the group's router gives
    exactly what a joint router gives with the other groups masked (method.md section 3).
 4. Balance losses are taken inside each group and attached to the probabilities, z-loss and orthogonality loss too.
 5. With ``moe_router_enable_expert_bias`` a bias per expert shifts the choice (not the weight); it is updated after
    each step from the loads *inside the group* (``update_group_biases``).
 6. Choices are counted for that bias, for calibration and for the log (``routing_metrics``), where asked for.

With one router nothing is masked and every operation is the stock ``TopKRouter``'s.

Tensor names carry their dimensions: N rows (s * b, sequence-major), E experts in slot order, K choices of a row, the
best first while gradients are enabled, H hidden size, T the 16 token types.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    router_gating_linear,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from symbiotic.model import balance
from symbiotic.model.routing import RoutingTable
from symbiotic.model.routing_metrics import RoutingSums, choices_by_type
from symbiotic.tokens.types import NUM_TOKEN_TYPES, TokenType


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one MoE layer as its router sees them.

    Attributes:
        routing: which router serves a token type and which group it chooses from.
        group_of_expert: int [E] group index of each *logical* expert.
        slot_to_expert: int [E] logical expert in each physical slot (see ``placement``).
    """

    routing: RoutingTable
    group_of_expert: np.ndarray
    slot_to_expert: np.ndarray

    def experts_of_router(self, router: int) -> np.ndarray:
        """Logical ids, ascending: row i of the router's weight belongs to the i-th of them."""
        return np.flatnonzero(self.group_of_expert == self.routing.group_of_router[router])

    def slots_of_group(self, group: int) -> np.ndarray:
        """Slots, ascending, that hold the group's experts."""
        return np.flatnonzero(self.group_of_expert[self.slot_to_expert] == group)


class RouterGate(nn.Module):
    """The weight of one of several routers: a row for each expert of its group, in logical order."""

    def __init__(self, weight: Tensor, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        # Each rank sees only its slice of the sequence, so Megatron must sum the gradient over the TP group.
        self.weight.sequence_parallel = sequence_parallel


class GroupRouter(TopKRouter):
    """Top-k routing inside expert groups.

    One router keeps the stock parameter ``weight`` [E, H]; several have ``<router name>.weight`` [experts of the
    router's group, H] each, so that each can have its own learning rate.

    Args:
        config: Megatron's configuration; ``moe_router_*`` fields mean what they mean for the stock router.
        experts: the layer's groups, routers and slots.
        balance_norm: ``megatron`` or ``hunyuan`` (top-k times Megatron's) norm of the balance loss.
        orthogonality: coefficient of the orthogonality loss of each router's weight; 0 for none.
        pg_collection: process groups.
        is_mtp_layer: always False: multi-token prediction is refused by the configuration.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        experts: LayerExperts,
        balance_norm: Literal["megatron", "hunyuan"] = "megatron",
        orthogonality: float = 0.0,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.experts = experts
        self.norm_factor = self.topk if balance_norm == "hunyuan" else 1
        self.orthogonality = orthogonality
        self.router_names = experts.routing.routers
        self.several_routers = len(self.router_names) > 1
        self.usage_mode: Literal["off", "training", "evaluation"] = "off"
        self.sums: RoutingSums | None = None  # of a step that will be logged, see symbiotic.model.usage
        self._register_tables()
        self._register_bias()
        if self.several_routers:
            self._split_weight()

    def _register_tables(self) -> None:
        """Index tables as buffers (integers and booleans, which a cast to bfloat16 leaves alone)."""
        experts, routing = self.experts, self.experts.routing
        group_of_slot = experts.group_of_expert[experts.slot_to_expert]
        group_of_router = np.asarray(routing.group_of_router)
        router_of_type = np.asarray(routing.router_of_type)

        def table(name: str, values: np.ndarray) -> None:
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(values)), persistent=False)

        table("router_of_type", router_of_type)
        table("allowed_slots", group_of_router[:, None] == group_of_slot[None, :])  # [routers, E]
        # Row of the joined weight that scores the expert in a slot; -1 where the router doesn't reach the slot.
        row_of_slot = np.full((len(group_of_router), len(group_of_slot)), -1)
        start = 0
        for router in range(len(group_of_router)):
            logical = experts.experts_of_router(router)
            rank_of_expert = {expert: start + rank for rank, expert in enumerate(logical)}
            for slot in np.flatnonzero(group_of_slot == group_of_router[router]):
                row_of_slot[router, slot] = rank_of_expert[experts.slot_to_expert[slot]]
            start += len(logical)
        table("row_of_slot", row_of_slot.max(axis=0) if not routing.shares_groups else row_of_slot)
        table("slot_to_expert", experts.slot_to_expert)
        table("group_of_slot", group_of_slot.astype(np.int64))
        table("group_sizes", np.bincount(group_of_slot, minlength=len(routing.groups)))
        table("usage", np.zeros((NUM_TOKEN_TYPES, len(group_of_slot)), dtype=np.int64))
        self.in_order = not routing.shares_groups and bool(
            (row_of_slot.max(axis=0) == np.arange(len(group_of_slot))).all()
        )
        for group in range(len(routing.groups)):
            table(f"slots_of_group_{group}", experts.slots_of_group(group))

    def _register_bias(self) -> None:
        """Replace the stock bias, whose update would weigh a group against the others, by one under our own name."""
        for name in ("expert_bias", "local_tokens_per_expert"):
            delattr(self, name)  # finalize_model_grads updates every module that has this attribute
        bias = load = None
        if self.enable_expert_bias:
            bias = torch.zeros(self.config.num_moe_experts, device=torch.cuda.current_device())
            load = torch.zeros_like(bias, dtype=torch.int64)
        self.register_buffer("group_bias", bias)  # in logical order, since it is saved
        self.register_buffer("group_load", load, persistent=False)  # in slot order

    def _maintain_float32_expert_bias(self) -> None:
        """Undo a cast of the whole module to bfloat16, as the stock router does for its bias."""
        if self.group_bias is not None and self.group_bias.dtype != torch.float32:
            self.group_bias = self.group_bias.float()

    def bias_by_slot(self) -> Tensor | None:
        """float32 [E] in slot order, or None without a bias."""
        if self.group_bias is None:
            return None
        self._maintain_float32_expert_bias()
        return self.group_bias[self.slot_to_expert]

    def _split_weight(self) -> None:
        """Replace the joint weight by one parameter a router, its rows sliced from the joint initialisation.

        Of several routers over one group the later ones get an initialisation of their own: equal ones would choose
        alike.
        """
        joint = self.weight.data  # rows in logical order
        del self.weight
        groups = self.experts.routing.group_of_router
        for index, name in enumerate(self.router_names):
            if groups[index] in groups[:index]:
                fresh = torch.empty_like(joint, dtype=torch.float32)
                self.config.init_method(fresh)
                joint = fresh.to(joint.dtype)
            rows = torch.from_numpy(self.experts.experts_of_router(index))
            # Not by add_module, which refuses the names of all attributes: a router may be called "eval".
            self._modules[name] = RouterGate(joint[rows].clone(), sequence_parallel=self.config.sequence_parallel)

    @property
    def gates(self) -> dict[str, nn.Parameter]:
        """Router name -> its weight."""
        if not self.several_routers:
            return {self.router_names[0]: self.weight}
        return {name: self._modules[name].weight for name in self.router_names}

    def joint_logits(self, hidden: Tensor, router_of_row: Tensor | None) -> Tensor:
        """Logits of every slot from the router that serves the row.

        Args:
            hidden: [s, b, H].
            router_of_row: int64 [s, b], or None with a single router.

        Returns:
            [s, b, E] in the routing precision, -inf outside the row's group.
        """
        weights = list(self.gates.values())
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if not self.in_order:
            weight = weight[self.row_of_slot.clamp(min=0)].reshape(-1, weight.shape[1])
        dtypes = {"fp32": torch.float32, "fp64": torch.float64}
        dtype = dtypes.get(self.config.moe_router_dtype, hidden.dtype)
        logits = router_gating_linear(hidden, weight, None, dtype)
        if router_of_row is None:
            return logits
        if self.experts.routing.shares_groups:
            num_slots = self.allowed_slots.shape[1]
            by_router = logits.unflatten(-1, (len(weights), num_slots))
            index = router_of_row[..., None, None].expand(*router_of_row.shape, 1, num_slots)
            logits = by_router.gather(2, index).squeeze(2)
        return logits.masked_fill(~self.allowed_slots[router_of_row], float("-inf"))

    def forward(self, input: Tensor, token_types: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route the rows of this rank.

        Args:
            input: [s, b, H], this rank's slice of the sequence under sequence parallelism.
            token_types: int8 [s, b], the same slice; never None in a model of ours.

        Returns:
            probs [N, E] (zero where not chosen, balance losses attached) and the boolean map [N, E] with exactly
            top-k True values in every row, padding rows included.
        """
        assert token_types is not None, "SymbioticModel.forward hands the token types to every layer"
        router_of_row = self.router_of_type[token_types.long()] if self.several_routers else None
        logits = self.joint_logits(self.apply_input_jitter(input), router_of_row)
        logits_NE = logits.flatten(0, 1)
        padding_N = (token_types == TokenType.PADDING).reshape(-1)
        logits_NE = self.apply_z_loss(logits_NE, padding_mask=padding_N)
        probs_NE, map_NE, choices_NK = self.choose(logits_NE)
        # In the recomputed pass only, where layers are recomputed: the first pass has no graph to attach to.
        if self.training and torch.is_grad_enabled():
            if self.is_aux_loss_enabled():
                inputs = self.balance_inputs(logits_NE, map_NE, padding_N)
                probs_NE = self.attach_balance_losses(probs_NE, inputs, batch_size=input.shape[1])
            if self.orthogonality:
                probs_NE = self.attach_orthogonality_losses(probs_NE)
        self.count(choices_NK, logits_NE, token_types)
        return probs_NE, map_NE

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """Multiply every input by uniform noise around 1, in training only (the stock router does it always)."""
        return super().apply_input_jitter(input) if self.training else input

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the mean of squared log-sum-exp over the microbatch's rows, padding left out (ST-MoE).

        The stock router takes the mean over each rank's rows and then over the ranks, which depends on the layout
        when padding is spread unevenly; here the rows of all ranks are counted first.

        Args:
            logits: [N, E], -inf outside a row's group.
            padding_mask: bool [N], True in padding rows.
        """
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not (self.training and torch.is_grad_enabled()):
            return logits
        valid = ~padding_mask
        count = valid.sum()
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(count, group=self.tp_cp_group)
        squares = torch.square(torch.logsumexp(logits, dim=-1)) * valid
        loss = squares.sum() / torch.clamp(count, min=1.0) * coefficient
        self._record("z_loss", loss / coefficient, reduce_group=self.tp_cp_group)
        return MoEAuxLossAutoScaler.apply(logits, loss)

    def attach_orthogonality_losses(self, probs_NE: Tensor) -> Tensor:
        """Attach every router's orthogonality loss, and record it for the log.

        The weights are the same on all ranks, whose gradients of them are summed over tensor and context parallelism
        and averaged over data parallelism; so each rank takes its share.
        """
        total = torch.zeros((), device=probs_NE.device)
        for name, weight in self.gates.items():
            loss = balance.orthogonality_loss(weight)
            self._record(f"{balance.ORTHOGONALITY}.{name}", loss, avg_group=self.tp_cp_group)
            total = total + loss
        return MoEAuxLossAutoScaler.apply(probs_NE, total * (self.orthogonality / self.tp_cp_group.size()))

    def _record(self, name: str, value: Tensor, **reduction: torch.distributed.ProcessGroup) -> None:
        get_moe_metrics_tracker().record(
            name, value, self.layer_number, self.config.num_layers, needs_dp_avg=True, **reduction
        )

    def choose(self, logits_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Top-k choice and weights; with several routers the indices are taken on the masked scores first, so
        that a score that underflows to zero never lets an expert of another group in.

        Returns:
            probs [N, E], the boolean map [N, E] and the choices int64 [N, K].
        """
        indices, bias = None, self.bias_by_slot()
        if self.several_routers:
            ranking = logits_NE
            if bias is not None:  # refused with softmax scores, as by megatron-core
                ranking = (torch.sigmoid(logits_NE.float()) + bias).masked_fill(logits_NE.isneginf(), float("-inf"))
            indices = torch.topk(ranking, k=self.topk, dim=1).indices
        probs_NK, choices_NK = topk_routing_with_score_function(
            logits_NE,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=bias,
            precomputed_indices=indices,
            dense_output=True,
        )
        probs_NE = torch.zeros_like(logits_NE).scatter(1, choices_NK, probs_NK)
        map_NE = torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, choices_NK, True)
        return probs_NE, map_NE, choices_NK

    def normalised_scores(self, logits_NE: Tensor) -> Tensor:
        """float32 [N, E], each row's sum one over the experts of its group: stock's scores for balance losses."""
        if self.score_function == "softmax":
            return torch.softmax(logits_NE, dim=-1, dtype=torch.float32)
        logits = logits_NE.float()
        scores = (
            torch.sigmoid(logits) if self.score_function == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()
        )
        return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)

    def balance_inputs(self, logits_NE: Tensor, map_NE: Tensor, padding_N: Tensor) -> balance.BalanceInputs:
        """Scores and choices for the balance losses: without bias, inside the group, padding rows out."""
        if self.several_routers and self.group_bias is None:
            # The choices made are the ones meant: the stock function's second top-k would cost as much as the first.
            valid_N1 = ~padding_N.unsqueeze(1)
            choices, scores = map_NE * valid_N1, self.normalised_scores(logits_NE) * valid_N1
        else:
            choices, scores = compute_routing_scores_for_aux_loss(
                logits_NE, self.topk, self.score_function, padding_mask=padding_N
            )
        groups = len(self.experts.routing.groups)
        slots = [getattr(self, f"slots_of_group_{group}") for group in range(groups)] if groups > 1 else None
        return balance.BalanceInputs(scores, choices, slots, self.topk)

    def attach_balance_losses(self, probs_NE: Tensor, inputs: balance.BalanceInputs, *, batch_size: int) -> Tensor:
        """Attach the groups' balance losses to ``probs_NE`` and record them for the log."""
        for kind, metric in balance.KINDS.items():
            coefficient = self.get_aux_loss_coeff(kind)
            if not coefficient:
                continue
            reduce_group, needs_dp_avg = self.tp_cp_group, True
            if kind == "global_aux_loss":
                # Each rank has its share of a loss over all data-parallel ranks, and Megatron averages their gradients
                # where the sum is meant: the stock router's loss counts data-parallel-size times less.
                coefficient *= self.tp_dp_cp_group.size() // self.tp_cp_group.size()
            weighted = coefficient * self.norm_factor
            if kind == "aux_loss":
                losses = balance.microbatch_losses(inputs, group=self.tp_cp_group, coefficient=weighted)
            elif kind == "seq_aux_loss":
                losses = balance.sequence_losses(
                    inputs, batch_size=batch_size, group=self.tp_cp_group, coefficient=weighted
                )
            else:
                reduce_group, needs_dp_avg = self.tp_dp_cp_group, False
                losses = self._global_losses(inputs, coefficient=weighted)
            for group, loss in zip(self.experts.routing.groups, losses, strict=True):
                probs_NE = self.attach_and_log_load_balancing_loss(
                    probs_NE, coefficient, loss, f"{metric}.{group}", reduce_group, needs_dp_avg=needs_dp_avg
                )
        return probs_NE

    def _global_losses(self, inputs: balance.BalanceInputs, *, coefficient: float) -> list[Tensor]:
        """``global_aux_loss``: f_i is the running mean over the microbatches of the step."""
        now = balance.reduce_from_tensor_model_parallel_region(inputs.choices_NE.sum(dim=0), self.tp_dp_cp_group)
        self.global_tokens_per_expert += now
        self.ga_steps += 1
        return balance.group_losses(
            inputs,
            tokens_per_expert=now,
            average_tokens_per_expert=self.global_tokens_per_expert / self.ga_steps,
            coefficient=coefficient,
        )

    def count(self, choices_NK: Tensor, logits_NE: Tensor, token_types: Tensor) -> None:
        """Count choices where someone asked for it: the bias update, calibration, the log.

        In training only while gradients are enabled, since recompute runs the forward pass twice; calibration and
        evaluation run without gradients and say so by ``usage_mode``.
        """
        learns = torch.is_grad_enabled()
        for_bias = learns and self.training and self.group_load is not None
        for_usage = learns if self.usage_mode == "training" else self.usage_mode == "evaluation"
        if not (for_bias or for_usage):
            return
        with torch.no_grad():
            types_N = token_types.reshape(-1).long()
            usage_TE = choices_by_type(choices_NK, types_N, num_experts=logits_NE.shape[1])
            load_E = usage_TE[: TokenType.PADDING].sum(dim=0)  # the last type is padding
            if for_bias:
                self.group_load += load_E
            if for_usage:
                self.usage += usage_TE
            if for_usage and self.sums is not None:
                capacity_E = self.sums.capacity.of_experts(load_E, self.group_of_slot, self.group_sizes)
                self.sums.add_kept(choices_NK, types_N, capacity_E, load_E)
                self.sums.add_entropy(self.normalised_scores(logits_NE), types_N)


@torch.no_grad()
def update_group_biases(model_chunks: Iterable[nn.Module]) -> None:
    """Move every expert's bias by the update rate towards its group's mean load (arXiv 2408.15664, inside groups).

    Call once after each step's gradients are final; collective over the ranks that share the routers. An expert
    with less than its group's mean load gains, one with more loses; a group without a token stays as it is.
    """
    for chunk in model_chunks:
        for router in chunk.modules():
            if not isinstance(router, GroupRouter) or router.group_load is None:
                continue
            torch.distributed.all_reduce(router.group_load, group=router.tp_dp_cp_group)
            experts = router.experts
            load = torch.empty_like(router.group_load)
            load[torch.from_numpy(experts.slot_to_expert)] = router.group_load
            for group in range(len(experts.routing.groups)):
                members = torch.from_numpy(np.flatnonzero(experts.group_of_expert == group))
                offset = load[members].double().mean() - load[members]
                router.group_bias[members] += torch.sign(offset).float() * router.config.moe_router_bias_update_rate
            router.group_load.zero_()


def forget_group_loads(model_chunks: Iterable[nn.Module]) -> None:
    """Leave the biases as they are after a step that isn't applied: its loads must not count in the next one."""
    for chunk in model_chunks:
        for router in chunk.modules():
            if isinstance(router, GroupRouter) and router.group_load is not None:
                router.group_load.zero_()


def collect_usage(routers: Sequence[GroupRouter]) -> Tensor:
    """This rank's usage counts since the last reset: int64 [routers, 16 types, E] by *logical* expert id."""
    rows = []
    for router in routers:
        by_expert = torch.zeros_like(router.usage)
        by_expert[:, torch.from_numpy(router.experts.slot_to_expert)] = router.usage
        rows.append(by_expert)
    return torch.stack(rows)

"""Step time of a two-group MoE layer over the stock megatron-core layer of the same sizes, on the CPU.

    python -m benchmarks.bench_router [--smoke]

Both sides are the MoE layer alone, forward and backward, so that attention and optimizer don't hide a difference: the
same experts class, dispatcher, shared expert, weights, input and number of tokens. Stock routes all tokens over all
experts with its own router and layer. Ours has three quarters of the experts for understanding and a quarter for
generation, a balance loss for each group, a full shield on generation rows, and the routing metrics at the default
interval: a unit of timing is one such interval, its last step records (their reduction after the step is not timed).
Units alternate, stock and ours, in one process and one thread; the ratio of a pair is taken before the median.

Writes the rows ``router.step_ratio_to_stock.<experts>x<top-k>.<precision>`` as JSON and as a dated table.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from benchmarks.table import RESULTS, write_page
from symbiotic.analysis.results import Row, Target, apply_targets, missed, write_results
from symbiotic.analysis.table import print_rows
from symbiotic.config.schema import LoggingConfig, RoutingMetricsConfig
from symbiotic.distributed.cpu_device import enter_cpu_device
from symbiotic.distributed.processes import destroy_processes, initialize_processes
from symbiotic.tokens.types import TokenType

if TYPE_CHECKING:
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

RATIO = "router.step_ratio_to_stock"
LIMIT = 1.03
INTERVAL = LoggingConfig().interval
"""Steps in a unit of timing: routing metrics are recorded in the last of them."""


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison. The experts that a token passes add up to a feed-forward width of 4 x ``width``."""

    experts: int
    topk: int
    width: int
    precision: str
    tokens: int
    pairs: int

    @property
    def name(self) -> str:
        """As in the metric's name."""
        return f"{self.experts}x{self.topk}.{self.precision}"

    @property
    def expert_width(self) -> int:
        """Feed-forward width of a routed expert and of the shared one."""
        return 4 * self.width // self.topk


def cases(*, smoke: bool) -> list[Case]:
    """The promised sizes, or small ones that only show that everything runs."""
    if smoke:
        return [Case(16, 2, 32, precision, tokens=128, pairs=2) for precision in ("fp32", "bf16")]
    sizes = ((16, 2, 256, 15), (128, 8, 512, 5))
    return [Case(*size[:3], precision, 4096, size[3]) for size in sizes for precision in ("fp32", "bf16")]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, nothing is written, no target")
    options = parser.parse_args()
    torch.set_num_threads(1)
    enter_cpu_device()
    initialize_processes(device="cpu")
    console = Console()
    rows = []
    try:
        for case in cases(smoke=options.smoke):
            console.print(f"{case.name}: width {case.width}, {case.tokens} tokens, {case.pairs} pairs", highlight=False)
            rows += measure(case)
    finally:
        destroy_processes()
    if not options.smoke:
        rows = apply_targets(
            rows, [Target(f"{RATIO}.{case.name}", "ratio", "<=", lambda _: LIMIT) for case in cases(smoke=False)]
        )
        write_results(RESULTS / "router.json", rows, command="make bench-router")
        write_page()
    print_rows(rows, console=console, title="Step time of the MoE layer")
    return 1 if missed(rows) else 0


def measure(case: Case) -> list[Row]:
    """Time the pairs of one case: the ratio's row, then both sides' milliseconds a step."""
    stock, ours = layers(case)
    hidden, types = batch(case)
    upstream = torch.randn_like(hidden)
    steps = (stepper(stock, hidden, None, upstream), stepper(ours, hidden, types, upstream))
    record = recorder(ours)
    seconds: list[list[float]] = [[], []]
    for pair in range(case.pairs + 1):
        for side in (0, 1) if pair % 2 else (1, 0):
            took = unit(steps[side], record if side else None)
            if pair:  # the first pair warms up
                seconds[side].append(took / INTERVAL)
    ratios = [ours_took / stock_took for stock_took, ours_took in zip(*seconds, strict=True)]
    medians = [1e3 * statistics.median(values) for values in seconds]
    return [
        Row(f"{RATIO}.{case.name}", statistics.median(ratios), "ratio", n=case.pairs),
        Row(f"router.step_ms.stock.{case.name}", medians[0], "ms", n=case.pairs * INTERVAL),
        Row(f"router.step_ms.ours.{case.name}", medians[1], "ms", n=case.pairs * INTERVAL),
    ]


def unit(step: Callable[[], None], record: Callable[[bool], None] | None) -> float:
    """Seconds that ``INTERVAL`` steps take; the last one records routing metrics where ``record`` can switch them."""
    started = time.perf_counter()
    for index in range(INTERVAL):
        if record is not None:
            record(index == INTERVAL - 1)
        step()
    return time.perf_counter() - started


def stepper(
    layer: "MoELayer", hidden: torch.Tensor, token_types: torch.Tensor | None, upstream: torch.Tensor
) -> Callable[[], None]:
    """One forward and backward pass of a layer; ``token_types`` travel as Megatron's padding mask."""

    def step() -> None:
        hidden.grad = None
        layer.zero_grad(set_to_none=False)
        output, _ = layer(hidden, padding_mask=token_types)
        output.backward(upstream)

    return step


def batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [s, b, h] and token types int8 [b, s]: spans of text, understanding codes and generation codes, a
    half, a quarter and a quarter."""
    generator = torch.Generator().manual_seed(0)
    rows, length = 4, case.tokens // 4
    hidden = torch.randn(length, rows, case.width, generator=generator).to(dtype_of(case)).requires_grad_()
    kinds = (TokenType.TEXT, TokenType.UNDERSTANDING_CODE, TokenType.TEXT, TokenType.GENERATION_CODE)
    types = torch.tensor(kinds, dtype=torch.int8).repeat_interleave(length // 4)
    return hidden, types.expand(rows, length).contiguous()


def dtype_of(case: Case) -> torch.dtype:
    """Parameters and activations."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]


def config_of(case: Case) -> "TransformerConfig":
    """Megatron's configuration of both sides."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=2,
        hidden_size=case.width,
        num_attention_heads=4,
        num_moe_experts=case.experts,
        moe_router_topk=case.topk,
        moe_ffn_hidden_size=case.expert_width,
        moe_shared_expert_intermediate_size=case.expert_width,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
        params_dtype=dtype_of(case),
        bf16=case.precision == "bf16",
    )


def layers(case: Case) -> "tuple[MoELayer, MoELayer]":
    """(stock, ours) with the same weights."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    from symbiotic.config.routing_defaults import default_routers
    from symbiotic.config.schema import GroupConfig
    from symbiotic.model.backends.torch import TorchBackend
    from symbiotic.model.moe_layer import GroupedMoELayer
    from symbiotic.model.partition import by_index
    from symbiotic.model.plan import ModelPlan
    from symbiotic.model.routing import RoutingTable
    from symbiotic.model.shield import set_shield_factors

    backend, config = TorchBackend(), config_of(case)
    mlp = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    submodules = MoESubmodules(
        experts=backend.grouped_mlp_modules(False), shared_experts=partial(SharedExpertMLP, submodules=mlp)
    )
    groups = {"understanding": case.experts * 3 // 4, "generation": case.experts // 4}
    routers = default_routers({name: GroupConfig(experts=size) for name, size in groups.items()})
    plan = ModelPlan(
        routing=RoutingTable.build(list(groups), {name: (item.types, item.group) for name, item in routers.items()}),
        partition=by_index(groups, [0]),
    )
    built = []
    for kind, extra in ((MoELayer, {}), (GroupedMoELayer, {"plan": plan})):
        torch.manual_seed(0)
        model_parallel_cuda_manual_seed(0)
        layer = kind(
            config, submodules, layer_number=2, pg_collection=ProcessGroupCollection.use_mpu_process_groups(), **extra
        )
        built.append(layer.to(dtype_of(case)).train())
    shield = [1.0] * 16
    shield[TokenType.GENERATION_CODE] = 0.0
    set_shield_factors([built[1]], shield)
    return built[0], built[1]


def recorder(layer: "MoELayer") -> Callable[[bool], None]:
    """Switches the routing metrics of our layer on or off."""
    from symbiotic.model.routing_metrics import Capacity
    from symbiotic.model.usage import start_recording, stop_recording

    settings = RoutingMetricsConfig()
    capacity = Capacity(factor=settings.capacity_factor, minimum=settings.minimum_capacity)

    def record(on: bool) -> None:
        if on:
            start_recording([layer], capacity)
        else:
            stop_recording([layer])

    return record


if __name__ == "__main__":
    sys.exit(main())

"""Balance loss per group, against the formula written out in float64."""

import numpy as np
import pytest
import torch

from tests.support.ranks import run_ranks

SIZES = {"understanding": 6, "generation": 3}
TEXT, UNDERSTANDING, GENERATION, PADDING = 0, 1, 2, 15


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize(
    "types",
    [(TEXT, UNDERSTANDING, GENERATION), (TEXT, GENERATION, PADDING), (TEXT, UNDERSTANDING, PADDING)],
    ids=["mixed", "padding", "no-generation-token"],
)
@pytest.mark.parametrize("norm", ["megatron", "hunyuan"])
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_each_group_is_balanced_over_its_own_tokens(kind, types, norm, recompute):
    """method.md section 4: inside each group from its own tokens and experts, never across groups, summed; padding is
    out; zero but connected where a group has no token; Hunyuan's norm is k times Megatron's."""
    (result,) = run_ranks(
        "tests.model.cases_router:balance_against_formula",
        kind=kind,
        sizes=SIZES,
        types=types,
        norm=norm,
        recompute=recompute,
    )
    for group in SIZES:
        assert result["recorded"][group] == pytest.approx(result["expected"][group], rel=1e-5)
        # Present even when the group has no token: zero, but connected to the graph.
        np.testing.assert_allclose(
            result["gradients"][group], result["expected_gradients"][group], rtol=2e-4, atol=1e-8
        )
    if GENERATION not in types:
        assert result["recorded"]["generation"] == 0.0
        assert not result["gradients"]["generation"].any()
    else:
        assert result["gradients"]["generation"].any()


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize(("norm", "uniform"), [("megatron", 1.0), ("hunyuan", 2.0)])
def test_one_at_uniform_use_whatever_the_groups_size(norm, uniform, recompute):
    """method.md section 4: 1.0 at uniform use in Megatron's norm, k times that in Hunyuan's."""
    (found,) = run_ranks(
        "tests.model.cases_router:uniform_use",
        sizes={"understanding": 13, "generation": 5},
        norm=norm,
        recompute=recompute,
    )
    for group in ("understanding", "generation"):
        name = f"load_balancing_loss.{group}"
        assert found["uniform"][name] == pytest.approx(uniform, rel=1e-6)
        assert found["uneven"][name] > uniform * 1.001


COEFFICIENT = 0.2
LAYOUTS = {"one": None, "TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "EP2": {"expert": 2}, "DP2": {}}


def global_losses(inputs, weights, *, group_of_type, topk=2):
    """Group -> mean over microbatches of the balance loss whose f_i is the running mean, in float64 with gradient.

    Args:
        inputs: for each microbatch, rows [n, h] of all ranks and their types [n].
        weights: group -> its router's weight [experts, h] in float64.
        group_of_type: token type -> group; padding is in none.
    """
    losses = {}
    for name, weight in weights.items():
        counts, losses[name] = [], []
        for rows, types in inputs:
            mine = torch.tensor([group_of_type.get(int(value)) == name for value in types])
            scores = (rows[mine].double() @ weight.T).softmax(dim=1)
            chosen = torch.zeros_like(scores).scatter(1, scores.topk(topk, dim=1).indices, 1.0)
            counts.append(chosen.sum(dim=0))
            mean_share = torch.stack(counts).sum(dim=0) / torch.stack(counts).sum()
            losses[name].append(len(weight) * torch.sum(mean_share * scores.mean(dim=0)))
    return {name: torch.stack(values).mean() for name, values in losses.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_global_balance_is_its_formula_in_every_layout(layout):
    """method.md section 6, comparing layouts: global_aux_loss is a running mean over microbatches, so each layout is
    compared with its own float64 formula, to 1e-6."""
    results = run_ranks(
        "tests.model.cases_global_balance:global_balance",
        world_size=1 if layout == "one" else 2,
        layout={"expert_tensor": 1, **(LAYOUTS[layout] or {})},
        groups=SIZES | {"understanding": 5},
        coefficient=COEFFICIENT,
        seeds=tuple(range(4)),
    )
    group_of_type = {TEXT: "understanding", UNDERSTANDING: "understanding", GENERATION: "generation"}
    layers = sorted({layer for result in results for layer in result["inputs"]})
    found = {}
    for layer in layers:
        ranks = [result for result in results if layer in result["inputs"]]
        microbatches = [
            tuple(torch.cat(parts) for parts in zip(*parts_of_ranks, strict=True))
            for parts_of_ranks in zip(*(result["inputs"][layer] for result in ranks), strict=True)
        ]
        weights = {name: gate.double().requires_grad_() for name, gate in ranks[0]["weights"][layer].items()}
        found[layer] = global_losses(microbatches, weights, group_of_type=group_of_type)
        if layer == layers[-1]:  # earlier ones also get the gradient of later layers' losses
            (COEFFICIENT * sum(found[layer].values())).backward()
            for result in ranks:
                for name, weight in weights.items():
                    actual, expected = result["gradients"][layer][name].double(), weight.grad
                    assert float((actual - expected).norm() / expected.norm()) < 1e-5
    assert len(layers) == 2
    for group in SIZES:
        expected = float(torch.stack([losses[group] for losses in found.values()]).mean())
        for result in results:
            assert result["metrics"][f"global_load_balancing_loss.{group}"] == pytest.approx(expected, rel=1e-6)

import pytest
import torch

from symbiotic.tokens.types import LossClass
from symbiotic.training.losses import LossNormaliser, class_totals, mean_by_class, sums_by_class, total_loss

WEIGHTS = (1.0, 0.5, 0.25)


def global_batch(rows: int = 8, length: int = 12, *, classes: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "losses": torch.rand(rows, length, generator=generator) * 5,
        "loss_classes": torch.randint(classes, (rows, length), generator=generator).to(torch.int8),
        # Unequal shares: most labels of the first rows have no loss.
        "loss_weights": (torch.rand(rows, length, generator=generator) < torch.linspace(0.1, 1, rows)[:, None]).float(),
    }


def formula(batch: dict[str, torch.Tensor]) -> float:
    """The definition, label by label in Python's floats."""
    labels = [batch[key].flatten().tolist() for key in ("losses", "loss_classes", "loss_weights")]
    result = 0.0
    for kind, class_weight in enumerate(WEIGHTS):
        of_class = [(loss, weight) for loss, label_class, weight in zip(*labels, strict=True) if label_class == kind]
        total = sum(weight for _, weight in of_class)
        if total:
            result += class_weight * sum(loss * weight for loss, weight in of_class) / total
    return result


def cut(batch: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    """Microbatches of ``rows`` rows."""
    starts = range(0, len(batch["losses"]), rows)
    return [{key: value[start : start + rows] for key, value in batch.items()} for start in starts]


def as_megatron_sums_it(batch, *, micro_batch_size: int, ranks: int) -> tuple[float, torch.Tensor]:
    """Microbatch j goes to rank j mod ranks; a rank divides by its microbatches, ranks are averaged."""
    losses = batch["losses"].clone().requires_grad_()
    microbatches = cut({**batch, "losses": losses}, micro_batch_size)
    totals = class_totals(microbatches, group=None)
    scale = len(microbatches) // ranks * ranks
    normaliser = LossNormaliser.build(totals, loss_weights=WEIGHTS, scale=scale)
    total = torch.zeros(())
    for microbatch in microbatches:
        loss, _ = normaliser(microbatch["losses"], microbatch)
        total = total + loss / (len(microbatches) // ranks) / ranks
    total.backward()
    return total.item(), losses.grad


@pytest.mark.parametrize(("micro_batch_size", "ranks"), [(8, 1), (4, 2), (2, 1), (2, 4), (1, 1), (1, 8)])
def test_the_loss_is_the_formula_however_the_batch_is_cut(micro_batch_size, ranks):
    batch = global_batch()
    loss, gradient = as_megatron_sums_it(batch, micro_batch_size=micro_batch_size, ranks=ranks)
    assert loss == pytest.approx(formula(batch), rel=1e-6)
    _, whole = as_megatron_sums_it(batch, micro_batch_size=8, ranks=1)
    torch.testing.assert_close(gradient, whole, rtol=1e-6, atol=0)


def test_a_class_without_labels_contributes_zero_and_stays_connected():
    batch = global_batch(classes=2)
    loss, gradient = as_megatron_sums_it(batch, micro_batch_size=2, ranks=1)
    assert loss == pytest.approx(formula(batch), rel=1e-6)
    assert torch.isfinite(gradient).all()


def test_a_batch_without_a_single_label_is_zero_with_zero_gradient():
    batch = global_batch()
    batch["loss_weights"].zero_()
    loss, gradient = as_megatron_sums_it(batch, micro_batch_size=2, ranks=2)
    assert loss == 0.0 and torch.equal(gradient, torch.zeros_like(gradient))


def test_labels_without_weight_have_no_gradient():
    batch = global_batch()
    _, gradient = as_megatron_sums_it(batch, micro_batch_size=4, ranks=1)
    assert torch.equal(gradient != 0, batch["loss_weights"] != 0)


def test_sums_and_means_by_class():
    batch = global_batch(classes=2)
    weighted = batch["losses"] * batch["loss_weights"]
    sums = sums_by_class(weighted, batch["loss_classes"])
    totals = class_totals(cut(batch, 2), group=None)
    means = mean_by_class(sums, totals)
    mask = (batch["loss_classes"] == LossClass.UNDERSTANDING) & (batch["loss_weights"] > 0)
    assert means["understanding"] == pytest.approx(batch["losses"][mask].double().mean().item())
    assert set(means) == {"text", "understanding"}, "a class without labels has no mean"
    assert total_loss(means, WEIGHTS) == pytest.approx(formula(batch), rel=1e-12)

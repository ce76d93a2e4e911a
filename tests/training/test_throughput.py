import pytest

from symbiotic.training.throughput import ModelShape, peak_tflops

SHAPE = ModelShape(
    hidden_size=64,
    attention_layers=3,
    dense_layers=1,
    moe_layers=2,
    num_heads=8,
    num_query_groups=2,
    head_size=16,
    dense_ffn=128,
    expert_ffn=32,
    shared_ffn=48,
    topk=2,
    num_experts=16,
    gated=True,
    vocabulary=512,
    sequence_length=100,
)


def test_flops_are_two_times_the_active_weights_plus_attention_scores():
    qkv, proj = 64 * (8 + 2 * 2) * 16, 8 * 16 * 64
    dense = 3 * 64 * 128
    moe = 2 * (3 * 64 * 32) + 3 * 64 * 48 + 64 * 16
    weights = 3 * (qkv + proj) + dense + 2 * moe + 64 * 512
    # A token attends to half of the 100 tokens on average: scores and values of 8 heads of 16.
    scores = 3 * 2 * (8 * 16 * 50)
    assert SHAPE.forward_flops_per_token() == 2 * (weights + scores)
    assert SHAPE.step_flops_per_token() == 3 * SHAPE.forward_flops_per_token()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A10", 125.0),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_device_name(name, peak):
    assert peak_tflops(name, bf16=True) == peak


def test_no_peak_for_float32():
    assert peak_tflops("NVIDIA H100 80GB HBM3", bf16=False) is None

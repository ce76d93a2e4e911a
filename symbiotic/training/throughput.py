"""Model FLOPs of a training step by formula, and the share of the device's peak that they are (MFU).

Counted: every matrix product of the forward pass, times 3 for forward and backward. Not counted: recomputation,
norms, softmax, routing. Attention is counted as causal over the whole sequence (half of s x s), so documents
shorter than the sequence make the figure an upper bound. A GPU whose peak isn't in the table has no MFU.
"""

from __future__ import annotations

from dataclasses import dataclass

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A30": 165.0,
}
"""Dense bfloat16 peak in TFLOP/s by a part of the device's name (vendor data sheets, without sparsity)."""


def peak_tflops(device_name: str, *, bf16: bool) -> float | None:
    """The device's peak in TFLOP/s, None where the table doesn't know it or the run isn't bfloat16.

    The longest part of the table that occurs in the name wins, so that 'H100 PCIe' is not taken for an H100 SXM.
    """
    words = device_name.replace("-", " ")
    known = [part for part in PEAK_TFLOPS if f" {part} " in f" {words} "]
    if not bf16 or not known:
        return None
    return PEAK_TFLOPS[max(known, key=len)]


@dataclass(frozen=True)
class ModelShape:
    """The sizes that the formula needs.

    Attributes:
        hidden_size: width of the residual stream.
        attention_layers, dense_layers, moe_layers: number of layers of each kind.
        num_heads, num_query_groups, head_size: attention.
        dense_ffn, expert_ffn, shared_ffn: width of a dense MLP, of a routed expert, of all shared experts together.
        topk: routed experts a token.
        num_experts: rows of the router.
        gated: two input projections in each MLP instead of one.
        vocabulary: rows of the output layer.
        sequence_length: tokens in a sample.
    """

    hidden_size: int
    attention_layers: int
    dense_layers: int
    moe_layers: int
    num_heads: int
    num_query_groups: int
    head_size: int
    dense_ffn: int
    expert_ffn: int
    shared_ffn: int
    topk: int
    num_experts: int
    gated: bool
    vocabulary: int
    sequence_length: int

    def forward_flops_per_token(self) -> float:
        """FLOPs of one token's forward pass; a multiply-add counts as two."""
        hidden = self.hidden_size
        heads = self.num_heads * self.head_size
        attention = hidden * (heads + 2 * self.num_query_groups * self.head_size) + heads * hidden
        # Scores and weighted values: two products over half the sequence on average.
        attention += 2 * heads * self.sequence_length / 2
        projections = 3 if self.gated else 2
        dense = projections * hidden * self.dense_ffn
        moe = projections * hidden * (self.topk * self.expert_ffn + self.shared_ffn) + hidden * self.num_experts
        layers = self.attention_layers * attention + self.dense_layers * dense + self.moe_layers * moe
        return 2.0 * (layers + hidden * self.vocabulary)

    def step_flops_per_token(self) -> float:
        """FLOPs of one token's forward and backward pass."""
        return 3.0 * self.forward_flops_per_token()

"""Routing drift: how far the routers have moved since the start of the run (method.md section 6).

When generation takes over the experts, the sharp routing pattern of text blurs. As one number: on fixed held-out
tokens, teacher-forced, the mean over the tokens of a type of

    KL(p_0 || p_now) = sum over the experts i of the token's own group of  p_0(i) * log(p_0(i) / p_now(i))

p is the softmax of the router's logits (or the sigmoids divided by their sum), before top-k and without the bias that
only shifts the choice. 0 at the start, by construction; nats.

p_0 is kept as logits in ``RUN/diagnostics/reference.pt``: float32 [blocks, tokens, experts] in the order of the
held-out samples and of the logical experts, so a resume in any layout compares with the same reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from symbiotic.distributed.agreement import on_every_rank, on_rank_zero
from symbiotic.errors import CheckpointError
from symbiotic.files import replacing, reporting_unwritable
from symbiotic.model.moe_layer import GroupedMoELayer, moe_layers_of
from symbiotic.model.router import GroupRouter
from symbiotic.tokens.types import NUM_TOKEN_TYPES, TokenType
from symbiotic.training.evaluation import HeldOut, evaluating
from symbiotic.training.forward import no_loss, run_schedule
from symbiotic.training.loader import Microbatch

REFERENCE_FILE = "diagnostics/reference.pt"
REFERENCE_VERSION = 1

MAX_TOKENS = 16_384
"""Tokens of each source whose routing is compared: whole samples from the first one on. A mean over so many is sharp
enough; with 48 layers of 128 experts the reference takes 400 MB a source."""


@dataclass(frozen=True)
class CalibrationTokens:
    """Which held-out tokens are compared, and where this rank meets them.

    Attributes:
        sources: validation sources by name.
        num_microbatches: how many microbatches of each source every rank runs, in the order of the sources.
        num_tokens: tokens compared, over all sources.
        first_token: for every microbatch that this rank runs, over all sources and batches in order: int64 [b], the
            number of each sample's first token, -1 for a sample that is not compared.
        digest: SHA-256 of the tokens and their types.
    """

    sources: Mapping[str, HeldOut]
    num_microbatches: list[int]
    num_tokens: int
    first_token: list[Tensor]
    digest: str

    @classmethod
    def build(
        cls, sources: Mapping[str, HeldOut], *, max_tokens: int = MAX_TOKENS, multiple: int = 1
    ) -> CalibrationTokens:
        """Choose the tokens: at most ``max_tokens`` of each source, but at least one sample. Collective.

        Args:
            sources: validation sources by name.
            max_tokens: of each source.
            multiple: what the pipeline schedule wants the number of microbatches in a pass to be a multiple of.
        """
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        first_token, num_microbatches, num_tokens = [], [], 0
        for source in sources.values():
            micro_batch_size, length = source.loader.shape
            microbatches = source.num_batches * source.loader.num_microbatches
            samples = min(microbatches * size * micro_batch_size, max(1, max_tokens // length))
            # Ranks without a compared sample in a microbatch run it too: the schedule is that of all ranks.
            needed = -(-samples // (size * micro_batch_size))
            num_microbatches.append(min(microbatches, -(-needed // multiple) * multiple))
            for number in range(num_microbatches[-1]):
                # Microbatch j of a rank is number j * size + rank of the batch (symbiotic.data.batches).
                sample = (number * size + rank) * micro_batch_size + torch.arange(micro_batch_size)
                first_token.append(torch.where(sample < samples, num_tokens + sample * length, -1))
            num_tokens += samples * length
        digest = _digest(_batches(sources, num_microbatches), first_token, num_tokens=num_tokens)
        return cls(sources, num_microbatches, num_tokens, first_token, digest)

    def batches(self) -> Iterator[list[Microbatch]]:
        """This rank's microbatches, batch by batch."""
        return _batches(self.sources, self.num_microbatches)


def _batches(sources: Mapping[str, HeldOut], num_microbatches: Sequence[int]) -> Iterator[list[Microbatch]]:
    for source, left in zip(sources.values(), num_microbatches, strict=True):
        per_batch = source.loader.num_microbatches
        for index in range(-(-left // per_batch)):
            yield source.loader(index)[: left - index * per_batch]


def _digest(all_batches: Iterator[list[Microbatch]], first_token: Sequence[Tensor], *, num_tokens: int) -> str:
    """SHA-256 of the tokens and types that are compared, the same on every rank."""
    device = torch.cuda.current_device()
    found = torch.zeros(2, num_tokens, dtype=torch.int64, device=device)
    microbatches = (batch for batches in all_batches for batch in batches)
    for batch, starts in zip(microbatches, first_token, strict=True):
        for row, start in enumerate(starts.tolist()):
            if start >= 0:
                places = slice(start, start + batch["tokens"].shape[1])
                found[0, places], found[1, places] = batch["tokens"][row], batch["token_types"][row].long()
    torch.distributed.all_reduce(found, group=parallel_state.get_data_parallel_group())
    return hashlib.sha256(found.cpu().numpy().tobytes()).hexdigest()


@dataclass
class BlockRouting:
    """Logits of one block's router for the tokens that this rank routes.

    Attributes:
        tokens: int64 [n] number of each token, see ``CalibrationTokens.first_token``.
        types: int8 [n].
        logits: float32 [n, experts] in logical order, -inf outside the token's group.
    """

    tokens: Tensor
    types: Tensor
    logits: Tensor


def capture_routing(chunks: Sequence[nn.Module], calibration: CalibrationTokens) -> dict[int, BlockRouting]:
    """Run the held-out batches forward, in evaluation mode; block -> what its router says. Collective."""
    with evaluating(chunks), _recording(chunks, calibration.first_token) as recorders:
        for batches in calibration.batches():
            run_schedule(chunks, batches, no_loss, forward_only=True, num_sums=1)
    return {block: recorder.routing() for block, recorder in recorders.items()}


@contextmanager
def _recording(chunks: Sequence[nn.Module], first_token: Sequence[Tensor]) -> Iterator[dict[int, _Recorder]]:
    layers = moe_layers_of(chunks)
    recorders = {layer.block: _Recorder(layer, first_token) for layer in layers}
    handles = [layer.router.register_forward_hook(recorders[layer.block]) for layer in layers]
    try:
        yield recorders
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Recorder:
    """Forward hook of one layer's router. Every layer meets the microbatches in the order of ``first_token``."""

    layer: GroupedMoELayer
    first_token: Sequence[Tensor]
    parts: list[BlockRouting] = field(default_factory=list)
    calls: int = 0

    def __call__(self, router: GroupRouter, arguments: tuple[Tensor, Tensor], output: Any) -> None:
        """Note the logits of the rows that are compared: hidden states [s, b, h], types [s, b] of this rank's slice."""
        hidden, types = arguments
        starts = self.first_token[self.calls].to(hidden.device)
        self.calls += 1
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        sliced = router.config.sequence_parallel
        if tensor_rank > 0 and not sliced:
            return  # the same rows as on tensor-parallel rank 0
        kept = starts >= 0
        first_position = tensor_rank * len(hidden) if sliced else 0
        positions = first_position + torch.arange(len(hidden), device=hidden.device)
        self.parts.append(
            BlockRouting(
                tokens=(starts[kept] + positions[:, None]).flatten().cpu(),
                types=types[:, kept].flatten().cpu(),
                logits=self._logits(router, hidden[:, kept], types[:, kept]),
            )
        )

    def _logits(self, router: GroupRouter, hidden: Tensor, types: Tensor) -> Tensor:
        by_slot = router.joint_logits(hidden, router.router_of_type[types.long()] if router.several_routers else None)
        by_expert = torch.empty_like(by_slot, dtype=torch.float32)
        by_expert[..., self.layer.slot_to_expert] = by_slot.float()
        return by_expert.flatten(0, 1).cpu()

    def routing(self) -> BlockRouting:
        """What was noted in all microbatches."""
        if not self.parts:
            empty = torch.zeros(0, dtype=torch.int64)
            return BlockRouting(empty, empty.to(torch.int8), torch.zeros(0, self.layer.config.num_moe_experts))
        names = ("tokens", "types", "logits")
        return BlockRouting(*(torch.cat([getattr(part, name) for part in self.parts]) for name in names))


class RoutingDrift:
    """Compares the routing of now with the reference of the run.

    Args:
        chunks: this rank's model chunks.
        calibration: the tokens to compare.
        blocks: numbers of all MoE blocks of the model, ascending.
        score_function: ``softmax`` or ``sigmoid``.
        path: file of the reference.

    Attributes:
        reference_step: steps that were done when the reference was taken.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        calibration: CalibrationTokens,
        *,
        blocks: Sequence[int],
        score_function: str,
        path: Path,
    ) -> None:
        self.reference_step = 0
        self._chunks = chunks
        self._calibration = calibration
        self._blocks = list(blocks)
        self._score_function = score_function
        self._path = path
        self._reference: dict[int, Tensor] = {}

    def take_reference(self, step: int) -> None:
        """Make the routing of now the reference, and save it by rename. Collective."""
        routing = capture_routing(self._chunks, self._calibration)
        self.reference_step = step
        self._reference = {block: found.logits for block, found in routing.items()}
        logits = []
        for block in self._blocks:
            gathered = self._gathered(routing.get(block))
            if torch.distributed.get_rank() == 0:
                logits.append(gathered.cpu())
        on_rank_zero(lambda: self._save(torch.stack(logits), step=step))

    def load_reference(self) -> bool:
        """Read the reference that an earlier launch saved; False where there is none. Collective.

        Raises:
            CheckpointError: the file is damaged, or of other held-out tokens or another model.
        """
        if not on_rank_zero(self._path.exists):
            return False
        saved = on_every_rank(self._load)
        on_rank_zero(lambda: self._check(saved))
        routing = capture_routing(self._chunks, self._calibration)
        self.reference_step = saved["step"]
        rows = {block: row for row, block in enumerate(self._blocks)}
        self._reference = {block: saved["logits"][rows[block]][found.tokens] for block, found in routing.items()}
        return True

    def measure(self) -> dict[str, list[float]]:
        """Token type -> mean KL of each block, for every type among the tokens but padding. Collective."""
        sums = torch.zeros(2, len(self._blocks), NUM_TOKEN_TYPES, dtype=torch.float64)
        for block, now in capture_routing(self._chunks, self._calibration).items():
            row, types = self._blocks.index(block), now.types.long()
            divergence = kl_divergence(self._reference[block], now.logits, score_function=self._score_function)
            sums[0, row].index_add_(0, types, divergence)
            sums[1, row] = torch.bincount(types, minlength=NUM_TOKEN_TYPES)
        sums = sums.to(torch.cuda.current_device())
        torch.distributed.all_reduce(sums)
        totals, counts = sums.cpu()
        return {
            member.name.lower(): (totals[:, member] / counts[:, member]).tolist()
            for member in TokenType
            if member is not TokenType.PADDING and counts[:, member].all()
        }

    def _gathered(self, found: BlockRouting | None) -> Tensor:
        """The logits of one block for all tokens, from the ranks that routed them: float32 [tokens, experts]."""
        device = torch.cuda.current_device()
        experts = self._chunks[0].config.num_moe_experts
        logits = torch.zeros(self._calibration.num_tokens, experts, device=device)
        if found is not None:
            logits[found.tokens.to(device)] = found.logits.to(device)
        torch.distributed.all_reduce(logits)
        return logits

    def _save(self, logits: Tensor, *, step: int) -> None:
        content = {**self._identity(), "step": step, "logits": logits, "sha256": _sha256(logits)}
        with reporting_unwritable(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as file:
                torch.save(content, file)

    def _identity(self) -> dict[str, Any]:
        return {"version": REFERENCE_VERSION, "tokens": self._calibration.digest, "blocks": self._blocks}

    def _load(self) -> dict[str, Any]:
        try:
            return torch.load(self._path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a damaged archive fails in many ways
            raise CheckpointError(f"{self._path}: can't read the reference routing ({error}); {_REMEDY}") from error

    def _check(self, saved: Any) -> None:
        """Refuse a file that isn't this run's reference, whole."""
        shape = (len(self._blocks), self._calibration.num_tokens, self._chunks[0].config.num_moe_experts)
        if not isinstance(saved, dict) or not {*self._identity(), "step", "logits", "sha256"} <= set(saved):
            raise CheckpointError(f"{self._path}: not a reference routing; {_REMEDY}")
        for key, expected in self._identity().items():
            if saved[key] != expected:
                raise CheckpointError(
                    f"{self._path}: its {key} are {saved[key]}, this launch has {expected}: data.validation and "
                    f"diagnostics.batches must stay as they were; {_REMEDY}"
                )
        if tuple(saved["logits"].shape) != shape:
            raise CheckpointError(f"{self._path}: shape {tuple(saved['logits'].shape)} instead of {shape}; {_REMEDY}")
        if _sha256(saved["logits"]) != saved["sha256"]:
            raise CheckpointError(f"{self._path}: damaged, its SHA-256 doesn't fit; {_REMEDY}")


_REMEDY = "put it back, or remove it to start a new reference at this step"


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def kl_divergence(reference: Tensor, now: Tensor, *, score_function: str) -> Tensor:
    """KL(p_0 || p_now) of each token, in nats.

    Args:
        reference: float [tokens, experts] logits, -inf outside the token's group.
        now: the same of now.
        score_function: ``softmax`` or ``sigmoid``.

    Returns:
        float64 [tokens].
    """
    before, after = (_log_probabilities(logits.double(), score_function) for logits in (reference, now))
    inside = ~before.isneginf()
    return torch.where(inside, before.exp() * (before - after), 0.0).sum(dim=-1)


def _log_probabilities(logits: Tensor, score_function: str) -> Tensor:
    scores = F.logsigmoid(logits) if score_function == "sigmoid" else logits
    return F.log_softmax(scores, dim=-1)

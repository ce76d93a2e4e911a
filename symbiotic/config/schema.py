# ruff: noqa: RUF009 (setting() returns a dataclasses.field, which is what the rule wants)
"""The typed tree: one small dataclass a section, each setting with its default, its limits and one line of help.

The three sections that carry the names of Megatron's own dataclasses are plain mappings here; they are typed in
``symbiotic.config.megatron``, once megatron-core may be imported. ``docs/configuration.md`` is generated from
these classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from symbiotic.config.messages import Origin

RoleRates = dict[str, float]


def setting(
    default: Any = MISSING,
    doc: str = "",
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    name: str | None = None,
) -> Any:
    """A field of a section: its default, one line of help and, for numbers, its limits (both inclusive).

    A list or dict default is copied for every instance. Without a default the setting must be given. ``name`` is its
    name in the file where Python has a keyword of that name.
    """
    metadata = {"doc": doc, "minimum": minimum, "maximum": maximum, "name": name}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def file_name(item: dataclasses.Field) -> str:
    """The name of a section's field in the YAML file."""
    return item.metadata.get("name") or item.name


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run itself: where its files go, its random seed, its device."""

    folder: str = setting(doc="Folder of everything the run writes: configuration, log, checkpoints, exit.json.")
    name: str | None = setting(None, "Name in logs and reports; null takes the folder's last part.")
    seed: int = setting(1234, "Seed of initialisation, dropout and data order.", minimum=0, maximum=2**31 - 1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes the GPU where there is one.")
    timeout_minutes: float = setting(
        10.0, "How long ranks wait for one that doesn't answer before the run fails.", minimum=0.01, maximum=10080.0
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model beyond TransformerConfig. A block is attention, then an MoE layer or a dense MLP."""

    blocks: int | None = setting(
        None, "Number of blocks; derived when layer_pattern is given.", minimum=1, maximum=10_000
    )
    dense_blocks: list[int] = setting([], "Block numbers, from 0, with a dense MLP instead of an MoE layer.")
    layer_pattern: str | None = setting(
        None, "HybridModel's pattern without pipeline cuts, such as '*-*E*E', instead of blocks and dense_blocks."
    )
    sequence_length: int = setting(256, "Tokens in a sample.", minimum=2)
    vocabulary: str = setting(doc="The vocabulary layout file (vocabulary.json) that the corpus was written with.")
    tie_embeddings: bool = setting(False, "One tensor for embedding and output layer; its role is then embedding.")
    rotary_base: int = setting(10_000, "Base of the rotary position embedding.", minimum=1)
    rotary_percent: float = setting(1.0, "Share of each head that is rotated.", minimum=0.0, maximum=1.0)
    qk_norm: Literal["per_head", "all_heads"] = setting(
        "per_head", "What TransformerConfig.qk_layernorm normalises: each head of the queries and of the keys, or all "
        "heads of a token together, as OLMoE does.",
    )  # fmt: skip
    backend: Literal["auto", "torch", "transformer_engine"] = setting(
        "auto", "Layer kernels; auto takes Transformer Engine on a GPU where it is installed, else torch."
    )


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """One group of routed experts."""

    experts: int = setting(
        doc="Routed experts of the group in each MoE block, or in the first one where a partition table gives blocks "
        "other sizes; at least moe_router_topk.",
        minimum=1,
    )
    topk: int | None = setting(
        None, "Refused unless it equals TransformerConfig.moe_router_topk: one top-k holds for all groups.", minimum=1
    )
    own: list[Literal["attention", "norm", "mlp"]] = setting(
        [], "Parts that the group's tokens have for themselves instead of sharing them (mixture-of-transformers)."
    )
    own_start: str | None = setting(
        None, "How own parts start when checkpoint.load names a checkpoint without them: copy_from:GROUP or random."
    )


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """One router: the token types it serves and the group it chooses from."""

    types: list[str] = setting(doc="Token types, such as text or generation_code, that this router serves.")
    group: str = setting(doc="Name of the group whose experts it chooses from.")


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """How the experts are split into the groups when training starts without a checkpoint's own partition."""

    method: Literal["index", "file", "random"] = setting(
        "index", "By expert number, from a table (tools/partition_experts.py writes one), or shuffled."
    )
    path: str | None = setting(None, "The table, for method file.")
    seed: int = setting(0, "Seed of method random.", minimum=0)
    merge: Literal["sum", "normalised_sum", "max", "rank"] = setting(
        "sum", "How tools/partition_experts.py joins the expert counts of several corpora."
    )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Balance loss beyond TransformerConfig's moe_router_load_balancing_type and moe_aux_loss_coeff."""

    norm: Literal["megatron", "hunyuan"] = setting(
        "megatron", "megatron: 1.0 at uniform use; hunyuan: top-k times that, so a coefficient weighs k times more."
    )
    orthogonality: float = setting(
        0.0, "Coefficient of mean((W W^T - I)^2), W the weight of a router with rows of norm 1.", minimum=0.0
    )


@dataclass(frozen=True, kw_only=True)
class ShieldTargets:
    """What the shield protects; ``output`` scales the gradient of a module's output rows, ``weights`` the rows' share
    of its weight gradient only, null leaves the module alone."""

    shared_expert: Literal["output", "weights"] | None = setting("output", "The shared expert of every MoE block.")
    attention: Literal["output"] | None = setting(None, "Every attention layer.")
    norm: Literal["weights"] | None = setting(None, "Every norm, those of queries and keys included.")
    embedding: Literal["weights"] | None = setting(None, "The token embedding; refused where it is tied.")


@dataclass(frozen=True, kw_only=True)
class ShieldConfig:
    """Gradient shield of what all tokens share; the factors by token type stand in the stages."""

    targets: ShieldTargets = setting(ShieldTargets(), "What is protected, and how.")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One corpus: a shard prefix and its weight in the mixture."""

    name: str = setting(doc="Name in logs, curves and stage mixtures.")
    prefix: str = setting(
        doc="Shard files are PREFIX.bin, PREFIX.idx and PREFIX.manifest.json. A pattern such as shards/web-* takes all "
        "that fit, sorted by name; @FILE a list with one prefix a line."
    )
    weight: float = setting(1.0, "Relative weight in the mixture; 0 leaves it to the stages.", minimum=0.0)
    format: Literal["symbiotic", "megatron"] = setting(
        "symbiotic", "megatron opens text shards of Megatron-LM's tools, which have neither types nor a manifest."
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpora and the way from documents to samples."""

    sources: list[SourceConfig] = setting([], "Training corpora.")
    validation: list[SourceConfig] = setting([], "Held-out corpora; the loss of each is reported by class.")
    packing: Literal["best_fit", "concatenate"] = setting(
        "best_fit",
        "best_fit keeps documents whole where it can; concatenate cuts the stream at every sequence_length tokens.",
    )
    seed: int | None = setting(None, "Seed of the data order; null takes run.seed.", minimum=0, maximum=2**31 - 1)
    workers: int = setting(0, "Background processes that read samples; 0 reads in the training process.", minimum=0)
    temperature: float | None = setting(
        None,
        "With one, every weight, of sources and of stages, is multiplied by tokens ** (1 / temperature) of its source: "
        "1 draws by size, a high one evenly. Not an exponent: 0.3 of other programs is 3.33 here.",
        minimum=1.0,
    )
    cache: str | None = setting(
        None,
        "Folder for what a start finds out from the index files, shared by runs, ranks and nodes; may be emptied at "
        "any time. Null keeps nothing: every start scans them.",
    )


@dataclass(frozen=True, kw_only=True)
class SkipConfig:
    """A stretch of steps that are passed over; both ends belong to it."""

    start: int = setting(doc="The first of them, as the log numbers steps: the run's first step is 1.", minimum=1,
                         name="from")  # fmt: skip
    end: int = setting(doc="The last of them.", minimum=1, name="to")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length of the run, batch sizes and evaluation."""

    steps: int | None = setting(None, "Optimizer steps; null is the sum of the stages.", minimum=1)
    micro_batch_size: int = setting(doc="Samples in one forward pass of one data-parallel rank.", minimum=1)
    global_batch_size: int = setting(doc="Samples in one optimizer step over all ranks.", minimum=1)
    evaluation_interval: int | None = setting(
        None, "Steps between evaluations; null evaluates at the end only.", minimum=1
    )
    evaluation_batches: int = setting(8, "Global batches of each validation source in one evaluation.", minimum=1)
    exit_after_steps: int | None = setting(
        None, "Save and leave after this many steps of this launch; the run stays resumable.", minimum=1
    )
    exit_after_minutes: float | None = setting(
        None,
        "Save and leave after this many minutes of this launch, start-up included. Rank 0 looks after each step: leave "
        "room for a step, an evaluation and a save before the job's limit.",
        minimum=0.0,
    )
    max_non_finite_steps: int = setting(
        10, "The run fails after this many steps in a row whose loss or gradient norm isn't finite. Such a step "
        "changes nothing, and the log names its layer, ranks and documents.",
        minimum=1,
    )  # fmt: skip
    skip_steps: list[SkipConfig] = setting(
        [], "Steps whose data is passed over: nothing is trained in them, and schedule, stages and data go on. May "
        "change when a run is resumed.",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps, as a factor on every role's rate."""

    warmup_steps: int = setting(0, "Steps over which the factor rises linearly from 0 to 1.", minimum=0)
    decay: Literal["constant", "cosine", "linear"] = setting("constant", "Shape after the warm-up.")
    decay_steps: int | None = setting(None, "Step at which final_factor is reached; null is the last step.", minimum=1)
    final_factor: float = setting(0.1, "Factor at the end of the decay.", minimum=0.0, maximum=1.0)


@dataclass(frozen=True, kw_only=True)
class MaopConfig:
    """Projection of gradients that point against Adam's first moment (MAOP of Rosetta, arXiv 2607.00293)."""

    roles: list[str] = setting(
        [], "Roles or patterns whose tensors are projected, such as shared_expert; empty turns it off."
    )


@dataclass(frozen=True, kw_only=True)
class ShieldRamp:
    """A shield factor that changes linearly over the first steps of its stage and stays at the last value."""

    start: float = setting(doc="Factor of the stage's first step.", minimum=0.0, name="from")
    end: float = setting(doc="Factor of the ramp's last step and of all later ones.", minimum=0.0, name="to")
    steps: int | None = setting(None, "Length of the ramp; null takes the whole stage.", minimum=2)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stretch of steps with its own shield, rates, loss weights and data mixture."""

    name: str = setting(doc="Name in logs and plots; unique.")
    steps: int | None = setting(
        None, "Length in optimizer steps; null, in the last stage only, lasts until training.steps.", minimum=1
    )
    shield: dict[str, float | ShieldRamp] = setting(
        {}, "Token type: factor, or ramp of it, on the gradient that its rows send into the targets of the shield; "
        "1.0 where unset.", minimum=0.0,
    )  # fmt: skip
    rate_factors: dict[str, float] = setting(
        {}, "Role or pattern: factor on its learning rate; 1.0 where unset.", minimum=0.0
    )
    loss_weights: dict[str, float] = setting(
        {}, "Loss class (text, understanding, generation): its weight in the loss; 1.0 where unset.", minimum=0.0
    )
    mixture: dict[str, float] = setting(
        {}, "Source: weight in this stage, 0 for a source that is not named; empty keeps data.sources' weights.",
        minimum=0.0,
    )  # fmt: skip
    frozen: list[str] = setting([], "Roles or patterns whose parameters stay untouched.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and loading."""

    interval: int | None = setting(500, "Steps between checkpoints; null saves at the end only.", minimum=1)
    async_save: bool = setting(
        False, "Write in the background, from a copy in host memory, while training goes on; one at a time."
    )
    keep: int = setting(2, "Newest checkpoints that are kept.", minimum=1)
    keep_every: int | None = setting(None, "Checkpoints at multiples of this step are kept for ever.", minimum=1)
    resume: Literal["auto", "never"] = setting(
        "auto", "auto goes on from the newest complete checkpoint of run.folder."
    )
    load: str | None = setting(
        None, "A checkpoint whose weights and partition training starts from, at step 0 with a fresh optimizer."
    )
    verify: Literal["full", "sizes"] = setting(
        "full", "What is checked of each file before a load, and after a save: its digest, or its size."
    )
    accept_changes: list[Literal["stages", "rates", "schedule", "maop", "shield", "data"]] = setting(
        [], "What may differ from the run that wrote the checkpoint; it is logged. Other differences are refused."
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Console, JSONL, TensorBoard and W&B."""

    interval: int = setting(10, "Steps between lines of the log.", minimum=1)
    tensorboard: bool = setting(True, "Write TensorBoard events to RUN/tensorboard.")
    wandb: str | None = setting(None, "Project in Weights & Biases; null logs nothing there.")


@dataclass(frozen=True, kw_only=True)
class RoutingMetricsConfig:
    """What the routers record in forward, by block and token type: load, entropy, dead experts, capacity rate."""

    interval: int | None = setting(
        None, "Steps between routing metrics; null takes logging.interval. Other steps record nothing.", minimum=1
    )
    capacity_factor: float = setting(
        1.0, "Capacity of an expert over its group's mean load, for the capacity rate; no token is dropped.",
        minimum=0.0,
    )  # fmt: skip
    minimum_capacity: int = setting(4, "Smallest capacity of an expert, in choices.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """Measurements that need passes of their own: routing drift, gradients into the shared experts, probes."""

    interval: int | None = setting(None, "Steps between diagnostics; null makes none.", minimum=1)
    batches: int = setting(1, "Global batches of each validation source that drift and probes run over.", minimum=1)
    drift: bool = setting(True, "KL from the reference routing to today's, teacher-forced on the held-out batches.")
    gradients: bool = setting(
        True, "Norms and cosines of the shared experts' gradients by loss class and by token type of the row."
    )
    probes: bool = setting(True, "Held-out loss with shared experts only, and without shared experts.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole configuration, resolved and checked. Build one with :func:`symbiotic.config.load_config`.

    After loading, ``groups`` and ``routers`` hold the derived defaults, and ``training.steps`` and every stage's
    ``steps`` are numbers. ``transformer``, ``optimizer`` and ``ddp`` hold the Megatron fields that the file sets,
    on top of our own defaults for them.
    """

    run: RunConfig
    model: ModelConfig
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    routers: dict[str, RouterConfig] = field(default_factory=dict)
    partition: PartitionConfig = PartitionConfig()
    balance: BalanceConfig = BalanceConfig()
    shield: ShieldConfig = ShieldConfig()
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig
    rates: RoleRates = setting(
        {}, "Role or pattern: peak learning rate. An exact name wins over a pattern.", minimum=0.0
    )
    schedule: ScheduleConfig = ScheduleConfig()
    stages: list[StageConfig] = field(default_factory=list)
    maop: MaopConfig = MaopConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    routing_metrics: RoutingMetricsConfig = RoutingMetricsConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    transformer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin, compare=False, repr=False)

    @property
    def num_experts(self) -> int:
        """Routed experts of one MoE block, over all groups."""
        return sum(group.experts for group in self.groups.values())

    @property
    def name(self) -> str:
        """``run.name``, or the last part of ``run.folder``."""
        return self.run.name or self.run.folder.rstrip("/").rsplit("/", 1)[-1]

    @property
    def data_seed(self) -> int:
        """``data.seed``, or ``run.seed``."""
        return self.run.seed if self.data.seed is None else self.data.seed

    def to_dict(self) -> dict[str, Any]:
        """The resolved tree as plain values under the names of the YAML file; loading it gives an equal Config."""
        tree = {}
        for item in dataclasses.fields(self):
            if item.name != "origin":
                tree[YAML_NAMES.get(item.name, item.name)] = _plain(getattr(self, item.name))
        return tree


YAML_NAMES = {
    "transformer": "TransformerConfig",
    "optimizer": "OptimizerConfig",
    "ddp": "DistributedDataParallelConfig",
}
"""Sections that carry the name of a Megatron dataclass: attribute of Config -> name in the file."""


def section_names() -> list[str]:
    """The names of all sections, as in a file and in its order."""
    return [YAML_NAMES.get(item.name, item.name) for item in dataclasses.fields(Config) if item.name != "origin"]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {file_name(item): _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value

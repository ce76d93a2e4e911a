"""The configuration: one typed tree from YAML, checked before anything expensive starts.

``load_config`` imports neither torch nor megatron. What needs them, the typed Megatron dataclasses, is in
``symbiotic.config.megatron``; ``symbiotic.config.plan`` computes sizes and memory for a dry run.
"""

from symbiotic.config.layout import check_world_size, layer_pattern, parallel_layout, pipeline_pattern
from symbiotic.config.load import config_from_tree, load_config, save_config
from symbiotic.config.roles import roles_of
from symbiotic.config.schema import Config
from symbiotic.config.tree import read_device

__all__ = [
    "Config",
    "check_world_size",
    "config_from_tree",
    "layer_pattern",
    "load_config",
    "parallel_layout",
    "pipeline_pattern",
    "read_device",
    "roles_of",
    "save_config",
]

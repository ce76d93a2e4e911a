"""What needs megatron-core in the tests of the presets: runs in a process of tests.support.ranks."""

from symbiotic.config import load_config
from symbiotic.config.megatron import check_megatron_fields


def check_fields(files: list[str]) -> int:
    """Check names and types of the Megatron sections of each file; how many there were."""
    for file in files:
        check_megatron_fields(load_config(file, check_files=False))
    return len(files)

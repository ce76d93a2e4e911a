"""docs/megatron_flags.md: every field of the installed megatron-core is refused, derived, or named with its tests.

The page is the list of unsupported flags; that each refusal works is in ``checks/test_megatron.py``.
"""

from collections import Counter
from pathlib import Path

import pytest

from symbiotic.config.flags_page import flags_page
from symbiotic.config.megatron_fields import DDP, DERIVED, OPTIMIZER, TRANSFORMER
from symbiotic.config.megatron_support import CONDITIONS, GPU_ONLY, SUPPORTED, UNUSED
from symbiotic.config.refused import REFUSALS
from symbiotic.errors import ConfigError
from tests.config.trees import config
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
SECTIONS = (TRANSFORMER, OPTIMIZER, DDP)


def test_the_page_in_the_tree_is_up_to_date():
    page = (ROOT / "docs" / "megatron_flags.md").read_text(encoding="utf-8")
    assert page == flags_page(), "run: python tools/config.py docs"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_of_megatron_stands_in_exactly_one_table(section):
    (fields,) = run_ranks("tests.config.cases_megatron:fields")
    tables = Counter(list(DERIVED[section]))
    refusals = {name for refusal in REFUSALS if refusal.section == section for name in refusal.fields}
    supported = [name for names in SUPPORTED[section].values() for name in names]
    # Some values of a field may work, or all of them on one device.
    tables.update(refusals - set(supported))
    tables.update(supported)
    tables.update(name for names in UNUSED[section].values() for name in names)
    assert set(fields[section]) - set(tables) == set(), "fields of megatron-core that nobody has looked at"
    assert set(tables) - set(fields[section]) == set(), "fields that this megatron-core doesn't have"
    assert [name for name, count in tables.items() if count > 1] == []


def test_the_page_names_every_refused_field():
    page = flags_page()
    names = {name for refusal in REFUSALS for name in refusal.fields}
    names |= {name for rows in UNUSED.values() for group in rows.values() for name in group}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
    assert [reason for refusal in REFUSALS if (reason := refusal.reason) not in page] == []


@pytest.mark.parametrize(
    ("section", "reason", "name"),
    [(section, reason, names[0]) for section, rows in UNUSED.items() for reason, names in rows.items()],
)
def test_a_field_that_nothing_reads_is_refused_by_name(section, reason, name):
    with pytest.raises(ConfigError) as caught:
        config(**{f"{section}/{name}": 1})
    assert str(caught.value) == f"test.yaml: {section}.{name} does nothing here: {reason}; leave it out"


@pytest.mark.parametrize(
    ("proof", "names"), [(proof, names) for rows in SUPPORTED.values() for proof, names in rows.items()]
)
def test_the_tests_of_a_supported_field_run_with_it(proof, names):
    if proof == GPU_ONLY:
        return
    test = ROOT / proof
    assert test.is_file()
    beside = [test, *test.parent.glob("cases*.py"), *test.parent.glob("t*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in beside if not path.name.startswith("test_"))
    text += test.read_text(encoding="utf-8")
    assert [name for name in names if name not in text] == []


def test_conditions_are_about_supported_fields():
    supported = {name for rows in SUPPORTED.values() for names in rows.values() for name in names}
    assert [name for name, _ in CONDITIONS if name not in supported] == []

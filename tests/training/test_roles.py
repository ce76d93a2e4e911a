import pytest

from symbiotic.errors import ConfigError
from symbiotic.training.roles import RoleRates, match_role, rate_table
from symbiotic.training.schedule import Schedule
from symbiotic.training.stages import Stage, StageTable

ROLES = ["attention", "expert.generation", "expert.understanding", "norm"]
RATES = {"expert.*": 1e-3, "*": 1e-5, "expert.understanding": 1e-6}


def rates(*stages: Stage, schedule: Schedule | None = None) -> RoleRates:
    schedule = schedule or Schedule(warmup_steps=0, decay="constant", decay_steps=1, final_factor=1.0)
    return RoleRates.build(ROLES, RATES, schedule=schedule, stages=StageTable(stages or [Stage("all", 0, 10)]))


def test_the_exact_name_wins_then_the_first_pattern():
    assert match_role("expert.understanding", RATES) == 1e-6
    assert match_role("expert.generation", RATES) == 1e-3
    assert match_role("norm", RATES) == 1e-5
    assert match_role("norm", {"expert.*": 1.0}) is None


def test_zero_is_a_rate():
    assert match_role("norm", {"norm": 0.0, "*": 1.0}) == 0.0


def test_a_role_without_a_rate_is_refused_by_name():
    schedule = Schedule(0, "constant", 1, 1.0)
    with pytest.raises(ConfigError, match=r"'norm' has no learning rate; set rates\.norm"):
        RoleRates.build(
            ROLES, {"expert.*": 1.0, "attention": 1.0}, schedule=schedule, stages=StageTable([Stage("a", 0, 1)])
        )


def test_a_rate_is_peak_times_stage_times_schedule():
    low = Stage("low", 0, 4, rate_factors={"expert.*": 0.5})
    high = Stage("high", 4, 10)
    table = rates(low, high, schedule=Schedule(warmup_steps=2, decay="constant", decay_steps=10, final_factor=1.0))
    assert table.at(0)["expert.generation"] == pytest.approx(1e-3 * 0.5 * 0.5)
    assert table.at(3)["expert.generation"] == pytest.approx(1e-3 * 0.5)
    assert table.at(4)["expert.generation"] == pytest.approx(1e-3)
    assert table.at(4)["expert.understanding"] == pytest.approx(1e-6)


def test_frozen_roles_follow_the_stage():
    table = rates(Stage("first", 0, 4, frozen=("expert.*",)), Stage("second", 4, 10, rate_factors={"norm": 0.0}))
    assert table.frozen_at(3) == {"expert.generation", "expert.understanding"}
    assert table.frozen_at(4) == {"norm"}
    assert table.at(3)["expert.generation"] == 0.0 and table.at(4)["expert.generation"] == 1e-3


def test_a_schedule_that_starts_at_zero_freezes_nothing():
    schedule = Schedule(warmup_steps=0, decay="linear", decay_steps=2, final_factor=0.0)
    assert rates(Stage("all", 0, 10), schedule=schedule).frozen_at(5) == frozenset()


def test_the_table_sums_up():
    counts = {"attention": 1200, "expert.generation": 30, "expert.understanding": 90, "norm": 8}
    lines = rate_table(rates(Stage("warm", 0, 2, frozen=("norm",)), Stage("rest", 2, 10)), counts).splitlines()
    assert lines[0].split() == ["role", "parameters", "warm", "rest"]
    assert ["norm", "8", "frozen", "1e-05"] in [line.split() for line in lines]
    assert lines[-1].split() == ["total", "1,328"]

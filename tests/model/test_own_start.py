"""Loading a checkpoint without the parts that a group has for itself."""

import pytest
import torch

from symbiotic.errors import CheckpointError
from symbiotic.model.own_start import copied_key, owner_of
from tests.support.ranks import RankFailed, run_ranks

CASES = "tests.model.cases_experts"
GROUPS = {"text": 3, "reading": 2, "drawing": 3}
ROUTERS = {
    "text": (["text"], "text"),
    "reading": (["understanding_code"], "reading"),
    "drawing": (["generation_code"], "drawing"),
}
QK_NORM = {"qk_layernorm": True}
WHOLE = {"attention": ("drawing",), "norm": ("drawing",), "mlp": ("drawing",)}


def plan(own):
    return {"groups": GROUPS, "routers": ROUTERS, "own": own}


@pytest.fixture
def without_own_parts(tmp_path):
    run_ranks(f"{CASES}:save", folder=str(tmp_path / "w"), plan=plan({}), config=QK_NORM, blocks=2, dense=(1,))
    return str(tmp_path / "w")


def load(folder, *, own, starts, layout=None):
    results = run_ranks(
        f"{CASES}:own_parts_loaded",
        world_size=1 if layout is None else 2,
        layout={"expert_tensor": 1, **(layout or {})},
        folder=folder,
        starts=dict.fromkeys(GROUPS) | starts,
        plan=plan(own),
        config=QK_NORM,
        blocks=2,
        dense=(1,),
    )
    return results


def test_keys():
    """Which checkpoint key an own part copies."""
    key = "decoder.layers.0.self_attention.own.drawing.linear_qkv.weight"
    assert owner_of(key) == "drawing"
    assert owner_of("decoder.layers.0.self_attention.linear_qkv.weight") is None
    assert copied_key(key, group="text", available=[]) == "decoder.layers.0.self_attention.linear_qkv.weight"
    reading = "decoder.layers.0.self_attention.own.reading.linear_qkv.weight"
    assert copied_key(key, group="reading", available=[reading]) == reading


@pytest.mark.parametrize("layout", [None, {"tensor": 2}, {"pipeline": 2}], ids=["one", "TP2", "PP2"])
@pytest.mark.parametrize("own", [WHOLE, {"mlp": ("drawing",)}], ids=["whole", "mlp"])
def test_copies_start_as_the_shared_parts(without_own_parts, own, layout):
    """method.md section 7, BAGEL: the generation branch is copied from the understanding branch, in any layout."""
    copied = 0
    for result in load(without_own_parts, own=own, starts={"drawing": "copy_from:text"}, layout=layout):
        for name, tensor in result["after"].items():
            if ".own.drawing." in name:
                shared = result["after"][name.replace("own.drawing.", "")]
                assert torch.equal(tensor, shared)
                assert not torch.equal(result["before"][name], shared)
                copied += 1
    assert copied


def test_random_parts_stay_as_they_were_drawn(without_own_parts):
    """method.md section 7, MoT: own parts may start at random."""
    (result,) = load(without_own_parts, own=WHOLE, starts={"drawing": "random"})
    own = [name for name in result["after"] if ".own." in name]
    assert own and all(torch.equal(result["after"][name], result["before"][name]) for name in own)


def test_a_start_must_be_chosen(without_own_parts):
    """Nothing says how missing own parts start: refused on every rank."""
    with pytest.raises(RankFailed) as caught:
        load(without_own_parts, own=WHOLE, starts={}, layout={"pipeline": 2})
    assert set(caught.value.exceptions) == {0, 1}
    for error in caught.value.exceptions.values():
        assert isinstance(error, CheckpointError)
        assert "step-7: it has no decoder.layers.0." in str(error)
        assert "set groups.drawing.own_start to copy_from:GROUP or random" in str(error)


def test_known_parts_are_loaded_and_may_be_copied(tmp_path):
    """A second owner copies the first one's parts, which the checkpoint has."""
    folder = str(tmp_path / "w")
    one = {"attention": ("reading",)}
    run_ranks(f"{CASES}:save", folder=folder, plan=plan(one), config=QK_NORM, blocks=2, dense=(1,))
    both = {"attention": ("reading", "drawing")}
    (result,) = load(folder, own=both, starts={"reading": "random", "drawing": "copy_from:reading"})
    name = "decoder.layers.2.self_attention.own.drawing.linear_qkv.weight"
    reading = name.replace("drawing", "reading")
    assert torch.equal(result["after"][reading], result["before"][reading])  # loaded, not drawn: both are the key's
    assert torch.equal(result["after"][name], result["after"][reading])
    assert not torch.equal(result["after"][name], result["after"][name.replace("own.drawing.", "")])

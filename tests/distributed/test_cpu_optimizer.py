"""The CPU device's AdamW against torch's own."""

import copy

import pytest
import torch

from symbiotic.distributed.cpu_optimizer import AdamW


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), (2, 2, 2))]


def _set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_steps_are_those_of_torch(decoupled):
    ours, theirs = _parameters(), _parameters()
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = AdamW(ours, adam_w_mode=decoupled, **settings)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **settings)
    for step in range(5):
        for parameters, stepping in ((ours, optimizer), (theirs, reference)):
            _set_gradients(parameters, step)
            stepping.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_the_step_is_counted_in_the_group_and_resumes():
    straight, stopped = _parameters(), _parameters()
    optimizer = AdamW([{"params": straight, "lr": 0.01}])
    for step in range(3):
        _set_gradients(straight, step)
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3
    assert set(optimizer.state[straight[0]]) == {"exp_avg", "exp_avg_sq"}

    before = AdamW([{"params": stopped, "lr": 0.01}])
    for step in range(2):
        _set_gradients(stopped, step)
        before.step()
    resumed = AdamW([{"params": stopped, "lr": 0.01}])
    resumed.load_state_dict(copy.deepcopy(before.state_dict()))
    _set_gradients(stopped, 2)
    resumed.step()
    for mine, other in zip(straight, stopped, strict=True):
        assert torch.equal(mine, other)


def test_groups_without_gradients_count_along_and_keep_their_values():
    moving, resting = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([{"params": [moving]}, {"params": [resting]}], lr=0.1, weight_decay=0.5)
    moving.grad = torch.ones(2)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    assert torch.equal(resting, torch.ones(2))
    assert not torch.equal(moving, torch.ones(2))


def test_a_group_may_mix_dtypes_and_hold_empty_shards():
    parameters = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    parameters.append(torch.nn.Parameter(torch.ones(0)))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    AdamW(parameters, lr=0.5).step()
    # The first step of Adam moves by the learning rate, whatever the gradient.
    torch.testing.assert_close(parameters[0].data, torch.full((3,), 0.5))
    assert torch.equal(parameters[1].data, torch.full((3,), 0.5, dtype=torch.bfloat16))


def test_graph_capture_is_refused():
    with pytest.raises(ValueError, match="optimizer_cuda_graph needs a GPU"):
        AdamW(_parameters(), capturable=True)

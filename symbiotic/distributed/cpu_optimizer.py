"""Adam for the CPU device, with the interface of apex's FusedAdam that Megatron expects.

torch's Adam keeps ``step`` as a tensor in the state of each parameter. Megatron's distributed optimizer then
can't make a state dict before the first step, nor load one that another layout wrote. FusedAdam keeps one
``step`` a parameter group instead, and so does this class; the arithmetic is torch's own fused CPU kernel.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (or L2 regularisation) and its ``step`` in the parameter group.

    A group is counted as stepped even when none of its parameters has a gradient, so that all groups agree.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: multiplied by the learning rate and the parameter (decoupled), or added to the gradient.
        adam_w_mode: decoupled weight decay (Loshchilov and Hutter, 2019) instead of L2 regularisation.
        capturable: CUDA-graph capture; must be false here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("OptimizerConfig.optimizer_cuda_graph needs a GPU; set it to false on the device cpu")
        # Megatron passes lr=None where every group has its own rate.
        super().__init__(params, {"lr": lr or 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        # The kernel takes lists of one dtype: fp32 parameters and bf16 ones may share a group.
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.numel() > 0:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        beta1, beta2 = group["betas"]
        for parameters in by_dtype.values():
            states = [self._state_of(parameter) for parameter in parameters]
            self._kernel(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(group["step"]))] * len(parameters),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The running averages of ``parameter``, made at its first step."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

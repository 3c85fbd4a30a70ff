"""Steps of ordinary Parameters with ordinary gradients: those of torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from .ondevice import Scaling


def step_dense(optimizer: torch.optim.AdamW, group: dict[str, Any], params: list[Tensor], scale: Scaling) -> None:
    """One step of `params`, by torch's own functions, so that every number and error is torch's."""
    live: list[Tensor] = []
    grads: list[Tensor] = []
    exp_avgs: list[Tensor] = []
    exp_avg_sqs: list[Tensor] = []
    max_exp_avg_sqs: list[Tensor] = []
    steps: list[Tensor] = []
    beta1, beta2 = group["betas"]
    with torch.set_grad_enabled(group["differentiable"]):
        has_complex = optimizer._init_group(
            {**group, "params": params}, live, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps
        )
        adam(
            live,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            amsgrad=group["amsgrad"],
            has_complex=has_complex,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=scale[0],
            found_inf=scale[1],
            decoupled_weight_decay=True,
        )

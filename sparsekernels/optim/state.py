"""The state of a parameter: moments and step counts; with sparse gradients, those of the rows seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic for a parameter."""
    return torch.promote_types(param.dtype, torch.float32)


def state_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype of its moments: the group's option, or fp64 for fp64 parameters."""
    dtype: torch.dtype = group.get("state_dtype") or torch.float32
    return dtype if compute_dtype(param) == torch.float32 else torch.float64


def fresh_state(
    param: Tensor, shape: torch.Size, group: dict[str, Any], step_device: torch.device
) -> dict[str, Tensor]:
    names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    state = {name: torch.zeros(shape, dtype=state_dtype(param, group), device=param.device) for name in names}
    return {"step": torch.zeros((), device=step_device, dtype=torch.float32), **state}


PER_ROW = (*MOMENTS, "row_step", "row_decay")


class SeenRows:
    """Maps rows of the table to entries of the state: `slots` [V] int32, -1 for rows without one."""

    def __init__(self, rows: Tensor, length: int) -> None:
        self.rows = rows
        self.slots = torch.full((length,), -1, dtype=torch.int32, device=rows.device)
        self.slots[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        self.rooms: dict[str, tuple[Tensor, Tensor]] = {}  # storage, and the part of it in use

    def add(self, ids: Tensor, state: dict[str, Tensor]) -> None:
        """Give every row in `ids` an entry; new entries are zero. Storage grows by doubling."""
        fresh = ids[self.slots[ids] < 0]
        if not len(fresh):
            return
        fresh = fresh.unique()
        before = len(state["rows"])
        after = before + len(fresh)
        for name in PER_ROW:
            if name in state:
                state[name] = self._longer(name, state[name], after)
        self.rows = state["rows"] = torch.cat([state["rows"], fresh])
        self.slots[fresh] = torch.arange(before, after, dtype=torch.int32, device=fresh.device)

    def _longer(self, name: str, lines: Tensor, count: int) -> Tensor:
        """`lines` with zeros appended. Only storage allocated here is written: the state may come from a file."""
        before = len(lines)
        room, used = self.rooms.get(name, (lines, lines))
        if used is not lines or count > len(room):
            room = lines.new_empty((min(len(self.slots), max(count, 2 * before)), *lines.shape[1:]))
            room[:before] = lines
        room[before:count] = 0
        self.rooms[name] = room, room[:count]
        return self.rooms[name][1]


def step_device(param: Tensor, group: dict[str, Any]) -> torch.device:
    """The device that counts the steps of a Parameter: the same as in torch.optim.AdamW."""
    return param.device if group["capturable"] or group["fused"] else torch.device("cpu")


def placed_step(step: Tensor, p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The step count as the ops need it: one for all, on the CPU where AdamW has it there, or one per position.

    Per-position counts that are all equal become one.
    """
    if step.dim() and len(step) and bool((step == step[0]).all()):
        step = step[0]
    device = p.device if step.dim() else step_device(p, {"capturable": False, "fused": None, **group})
    return step.to(device, torch.float32, copy=True)

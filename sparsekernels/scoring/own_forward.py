"""Detects parameters that are also used outside their module's forward, where a sparse backward cannot see them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from ..common.messages import listed, warn

OUTSIDE = "a weight used outside its module's forward, by a parent or the loss, has no sparse gradient"
ALIAS = "sparsekernels: alias"  # marks its node in the graph


class OwnForward:
    """A context in which a module's own forward reads an alias of each parameter, and other code the parameter itself.

    A parameter is an alias here exactly where `train_only` would give it a sparse backward: both put theirs into the
    __dict__ of the module, where Python looks first. The model runs uncompiled: a compiled graph does not tell who
    reads a parameter.

    Args:
        model: any torch model.
        parameters: those to watch, by name; they require gradients on entry.

    Attributes:
        own: names of the parameters that their own module used with gradients, including in recomputation.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters, self.own = parameters, set[str]()
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._holders = {
            module: mine
            for module in model.modules()
            if (mine := {a: names[id(p)] for a, p in module._parameters.items() if id(p) in names})
        }
        self._leaves: dict[Node, str] = {}

    def __enter__(self) -> OwnForward:
        self._leaves = {get_gradient_edge(parameter).node: name for name, parameter in self.parameters.items()}
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import is slow
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(self._forget)
            for module in self._holders:
                if type(module) in (nn.Linear, nn.Embedding) and "forward" not in module.__dict__:
                    module.__dict__["forward"] = partial(
                        self._forward, module
                    )  # also for code that calls module.forward
                    stack.callback(module.__dict__.pop, "forward")
                else:
                    stack.callback(module.register_forward_pre_hook(self._put).remove)
                    stack.callback(module.register_forward_hook(self._take, always_call=True).remove)
            self._left = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()

    def _forget(self) -> None:
        for module in self._holders:
            self._take(module)  # after an interrupt torch does not run hooks
        self._leaves = {}

    def outside(self, loss: Tensor) -> set[str]:
        """Names of the parameters that the graph of `loss`, before its backward, also reaches without their alias."""
        found: set[str] = set()
        left: list[Any] = [loss.grad_fn] if loss.grad_fn is not None else []
        seen = {None, *left}
        while left:
            node = left.pop()
            for following, _ in node.next_functions:
                if following in self._leaves:
                    if ALIAS not in node.metadata:
                        found.add(self._leaves[following])
                elif following not in seen:
                    seen.add(following)
                    left.append(following)
        return found

    def _put(self, module: nn.Module, *_: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for attribute, name in self._holders[module].items():
            alias = torch.ops.aten.alias(self.parameters[name])  # a view would not pass a sparse gradient on
            self.own.add(name)
            alias.grad_fn.metadata[ALIAS] = True
            module.__dict__[attribute] = alias

    def _take(self, module: nn.Module, *_: Any) -> None:
        for attribute in self._holders[module]:
            module.__dict__.pop(attribute, None)

    def _forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._put(module)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            self._take(module)


def refuse_outside(names: Iterable[str], argument: str) -> None:
    """Raise ValueError if there are any: the caller asked for them, and train_only could not train them."""
    if names := list(names):
        raise ValueError(f"{argument}: {listed(names)} cannot be trained: {OUTSIDE}; leave them out")


def warn_left_out(method: str, names: Iterable[str]) -> None:
    """Warn if there are any that a method would have selected by default."""
    if names := list(names):
        warn(f"{method} leaves out {listed(names)}: {OUTSIDE}")

"""Compiled forwards: a network traced once a shape, dtype and structure, its element-wise chains fused.

`mx.compile` keeps a trace for the shapes and dtypes of its inputs and of captured arrays, and knows nothing
of the Python around them: a number that changed, a layer of another class or a processor that was replaced
would go on as they were. So each structure of a network, all but its arrays, gets a function of its own here.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from threading import RLock
from types import FunctionType, MethodType, ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .operations import active_tracer

_CONSTANTS = (bool, int, float, str, bytes, mx.Dtype)
_OPAQUE = (type, FunctionType, MethodType, ModuleType)

_MOST_STRUCTURES = 4
"""Structures whose traces are kept: some to switch between, such as with and without FreeU."""


class CompiledForward:
    """The method `forward` of a subclass, compiled, a computation with the weights of `module`.

    Takes what `mx.compile` takes: arrays, and tuples, lists and dicts of arrays and constants. Weights are
    inputs of the trace, so that new ones count at once; what else changes in the module makes a new trace.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._compiled: OrderedDict[Hashable, tuple[Callable[..., Any], list[Any]]] = OrderedDict()
        # MLX puts placeholders into the module while it traces, which another thread must not meet.
        self._lock = RLock()

    def forward(self, *args: Any) -> Any:
        """The computation."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledForward":
        """Return the value of a copy of the module, which has compiled nothing yet."""
        return type(self)(copy.deepcopy(self._module, memo))

    def __call__(self, *args: Any) -> Any:
        """Return the result of `forward` for these arguments."""
        tracer = active_tracer()
        if tracer is not None:
            return tracer.compiled(self.forward, *args)
        with self._lock:
            return self._run(*args)

    def _run(self, *args: Any) -> Any:
        structure = _Structure(self._module)
        key = structure.key
        if key not in self._compiled:
            # Dropout draws; a function of its own, for MLX keeps traces by function.
            random = mx.random.state if self._module.training else None
            function = mx.compile(
                lambda *args: self.forward(*args), inputs=[self._module, random], outputs=random
            )
            self._compiled[key] = function, structure.held
            if len(self._compiled) > _MOST_STRUCTURES:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        high, low = mx.random.state[0].tolist() if self._module.training else (0, 0)
        try:
            return self._compiled[key][0](*args)
        except BaseException:
            # MLX leaves the placeholders of a trace that failed where it put them.
            for container, name, array in structure.arrays:
                container[name] = array
            if self._module.training:
                mx.random.seed(high << 32 | low)
            raise


class _Structure:
    """Everything in a module that a trace depends on but its arrays: classes, constants, nesting.

    Attributes:
        key: hashable; equal for modules of equal structure.
        held: what could not be looked into, such as functions, and arrays outside the trees of modules, which
            are constants of a trace: they count by identity, so that their ids must stay taken.
        arrays: (container, key, array) of the arrays of the tree.
    """

    def __init__(self, module: nn.Module):
        self.held: list[Any] = []
        self.arrays: list[tuple[Any, Any, mx.array]] = []
        self._seen: dict[int, int] = {}
        self.key = self._of(module)

    def _of(self, value: Any) -> Hashable:
        if value is None or isinstance(value, _CONSTANTS):
            return type(value), value
        if isinstance(value, CompiledForward):
            return CompiledForward  # of itself, or of a network inside
        if isinstance(value, list | tuple):
            return type(value), tuple(map(self._of, value))
        if isinstance(value, set | frozenset):
            return type(value), frozenset(value)
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        if isinstance(value, nn.Module):
            # As a dict it holds its arrays, modules and containers; in its __dict__, all else.
            return type(value), self._tree(value), self._of(vars(value))
        if isinstance(value, dict):
            return type(value), tuple((name, self._of(item)) for name, item in value.items())
        if isinstance(value, partial):
            return partial, self._of([value.func, value.args, value.keywords])
        if hasattr(value, "__dict__") and not isinstance(value, _OPAQUE):
            return type(value), self._of(vars(value))
        self.held.append(value)
        return id(value)

    def _tree(self, container: dict | list | tuple) -> Hashable:
        """The same for a tree of parameters, whose arrays are inputs of a trace."""
        inside = []
        for name, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, mx.array):
                self.arrays.append((container, name, value))
                inside.append((name, mx.array))  # MLX looks at shape and dtype itself
            elif isinstance(value, dict | list | tuple) and not isinstance(value, nn.Module):
                inside.append((name, type(value), self._tree(value)))
            else:
                inside.append((name, self._of(value)))
        return tuple(inside)

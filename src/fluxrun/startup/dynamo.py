"""A stand-in for torch's compiler in a process that compiles nothing: seconds of imports for a few marks.

diffusers and torchao mark their functions for a compiler (``allow_in_graph``, ``torch.compiler.disable``,
``register_decomposition``) while they are imported. Without a compiler the marks mean nothing. What they mark stays as
it is, so every class is the very same one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

NAME = "torch._dynamo"

INDUCTOR = "torch._inductor"


class OptimizedModule:
    """What ``torch.compile`` makes of a module, for ``isinstance``: here there are none."""


class TransformGetItemToIndex:
    """What transformers makes masks from Python functions with; the text encoders' masks are none of those."""

    def __init__(self) -> None:
        _left_out(NAME)("_trace_wrapped_higher_order_op")


def install() -> None:
    """Take the compiler's place, for as long as the process lives. Not where it is imported already."""
    if NAME not in sys.modules and INDUCTOR not in sys.modules:
        sys.modules |= {module.__name__: module for module in _stand_ins()}


def _stand_ins() -> list[ModuleType]:
    """dynamo and inductor, and those of their modules that others import: marks return what they are given."""
    marks = dict.fromkeys(("allow_in_graph", "assume_constant_result", "disallow_in_graph"), _same)
    frames = SimpleNamespace(OptimizedModule=OptimizedModule)
    decomposition = module(f"{INDUCTOR}.decomposition", register_decomposition=lambda ops: _same)
    return [
        module(
            NAME, **marks, disable=_disable, is_compiling=lambda: False, eval_frame=frames, __getattr__=_left_out(NAME)
        ),
        module(f"{NAME}.utils", is_compile_supported=lambda device: False),  # torchvision asks
        module(f"{NAME}._trace_wrapped_higher_order_op", TransformGetItemToIndex=TransformGetItemToIndex),
        module(INDUCTOR, decomposition=decomposition, __getattr__=_left_out(INDUCTOR)),
        decomposition,
    ]


def module(name: str, **content: Any) -> ModuleType:
    """A module that holds this."""
    made = ModuleType(name, __doc__)
    vars(made).update(content)
    return made


def _same(marked: Any) -> Any:
    return marked


def _disable(fn: Any = None, *_: Any, **__: Any) -> Any:
    return _same if fn is None else fn


def _left_out(package: str) -> Callable[[str], NoReturn]:
    def refuse(name: str) -> NoReturn:
        raise AttributeError(f"{package}.{name}: nothing in this run's plan uses torch's compiler, so it was left out")

    return refuse

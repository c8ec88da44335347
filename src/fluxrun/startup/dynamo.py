"""A stand-in for ``torch._dynamo`` in a process that compiles nothing: a second of imports for a few marks.

diffusers marks its blocks for a compiler (``allow_in_graph``, ``torch.compiler.disable``) while it is imported. Without
a compiler the marks mean nothing. What they mark stays as it is, so every class is the very same one.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

NAME = "torch._dynamo"


class OptimizedModule:
    """What ``torch.compile`` makes of a module, for ``isinstance``: here there are none."""


class TransformGetItemToIndex:
    """What transformers makes masks from Python functions with; the text encoders' masks are none of those."""

    def __init__(self) -> None:
        _left_out("_trace_wrapped_higher_order_op")


def install() -> None:
    """Take dynamo's place, for as long as the process lives. Not where it is imported already."""
    if NAME not in sys.modules:
        sys.modules |= {module.__name__: module for module in _stand_ins()}


def _stand_ins() -> list[ModuleType]:
    """dynamo, and the one of its modules that transformers imports: marks return what they are given."""
    marks = dict.fromkeys(("allow_in_graph", "assume_constant_result", "disallow_in_graph"), _same)
    frames = SimpleNamespace(OptimizedModule=OptimizedModule)
    return [
        _module(NAME, **marks, disable=_disable, is_compiling=lambda: False, eval_frame=frames, __getattr__=_left_out),
        _module(f"{NAME}._trace_wrapped_higher_order_op", TransformGetItemToIndex=TransformGetItemToIndex),
    ]


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name, __doc__)
    vars(module).update(content)
    return module


def _same(marked: Any) -> Any:
    return marked


def _disable(fn: Any = None, *_: Any, **__: Any) -> Any:
    return _same if fn is None else fn


def _left_out(name: str) -> NoReturn:
    raise AttributeError(f"torch._dynamo.{name}: nothing in this run's plan uses torch's compiler, so it was left out")

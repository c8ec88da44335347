"""What a checkpoint's component says of its own quantization in its config.json. Light: a plan reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fluxrun.types import Json, JsonObject

PACKAGES = {"sdnq": "sdnq", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}
"""The package that reads a ``quant_method``; others are refused before anything is loaded."""


@dataclass(frozen=True)
class Declared:
    """The quantization that a component's weights were saved with."""

    method: str
    """``quant_method``, as the libraries have it."""
    details: str = ""

    def __str__(self) -> str:
        return f"{self.method} {self.details}".rstrip()

    @property
    def package(self) -> str | None:
        """The package that loads it; None where fluxrun loads it not at all."""
        return PACKAGES.get(self.method)


def declared_by(config: JsonObject) -> Declared | None:
    """What a component's config.json declares, or None for ordinary weights."""
    node = config.get("quantization_config")
    if not isinstance(node, Mapping):
        return None
    named = node.get("quant_method") or "a method that it does not name"
    method = str(getattr(named, "value", named))  # of a loaded component it is an enum's member
    return Declared(method, _details(method, node))


def _details(method: str, node: JsonObject) -> str:
    """What people choose a quantized checkpoint by: format, group size and rank."""
    if method == "sdnq":
        parts = [str(node.get("weights_dtype", "")), "dynamic" if node.get("use_dynamic_quantization") else ""]
        parts += [f"group {size}"] if (size := _number(node.get("group_size"))) > 0 else []
        parts += [f"SVD rank {_number(node.get('svd_rank'))}"] if node.get("use_svd") else []
        parts += ["Hadamard"] if node.get("use_hadamard") else []
        return ", ".join(filter(None, parts))
    if method == "bitsandbytes":
        return str(node.get("bnb_4bit_quant_type") or "4 bits") if node.get("load_in_4bit") else "int8"
    if method == "torchao":
        kind = node.get("quant_type")
        inner = kind.get("default") if isinstance(kind, Mapping) else kind
        return str(inner.get("_type", "") if isinstance(inner, Mapping) else inner or "")
    return ""


def _number(value: Json) -> int:
    return value if isinstance(value, int) else 0

"""LoRA files: where they lie, checked before anything heavy is loaded, and read for one transformer."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrun.errors import ConfigError
from fluxrun.formatting import gigabytes, nearest
from fluxrun.options.adapters import Adapter, LoraWeights, Matrices, Sizes, room_for
from fluxrun.options.lora import LoraFile, LoraOption
from fluxrun.options.model import BUNDLED
from fluxrun.paths import expanded
from fluxrun.reading import Unreadable, check_plain, parse_json, read_text
from fluxrun.weights.download import download_file
from fluxrun.weights.headers import Tensor, read_whole_header
from fluxrun.weights.hub import locate_file
from fluxrun.weights.location import Located
from fluxrun.weights.lora_names import Match, Sorted, alpha_by_peft, match_layers, peft_config, sort_tensors

if TYPE_CHECKING:
    import torch

MOST_BYTES = 16 * 10**9
"""No LoRA comes near to it: rank 256 in every layer of dev is 8 GB in float32."""

MOST_RANK = 4096

USUAL_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers saves."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file that was found, on this disk or on the hub."""

    spec: LoraFile
    located: Located | None = None
    """For a hub id: its file, which may still have to be downloaded."""
    local: Path | None = None

    @property
    def file(self) -> Path | None:
        """The file on this disk, if it is there."""
        if self.located is None:
            return self.local
        return self.located.folder / self.located.files[0] if self.located.folder else None


@dataclass(frozen=True)
class _Header:
    """What a LoRA file's header says."""

    tensors: Mapping[str, Tensor]
    found: Sorted
    config: Mapping[str, Any]
    """Its LoraConfig, as far as its writer left one."""


def find_adapters(option: LoraOption) -> tuple[LoraSource, ...]:
    """The files of a ``lora`` option, each found and its header checked. Imports no torch; raises ConfigError."""
    if not option.adapts:
        return ()
    sources = tuple(map(_find, option.files))
    for source in sources:
        if source.file is not None:
            _checked_header(source)
    return sources


def adapter_elements(sources: Iterable[LoraSource]) -> int:
    """Numbers in a run's adapter: each layer that a file names has its matrices in the files' ranks together."""
    rank, waiting = 0, 0
    sizes: dict[str, int] = {}
    for source in sources:
        if source.file is None:
            assert source.located is not None
            waiting += source.located.download_bytes // 2  # of two bytes each, as nearly all are
            continue
        header = _checked_header(source)
        shapes = {
            layer: (header.tensors[parts.down or ""].shape, header.tensors[parts.up or ""].shape)
            for layer, parts in header.found.layers.items()
        }
        rank += max((down[0] for down, _ in shapes.values()), default=0)
        sizes |= {layer: down[1] + up[0] for layer, (down, up) in shapes.items()}
    return rank * sum(sizes.values()) + waiting


def load_adapters(
    sources: Iterable[LoraSource],
    upcoming: Iterable[Iterable[LoraSource]],
    transformer: Any,
    say: Callable[[str], None],
) -> LoraWeights:
    """Read the files for this transformer, with room for those of later runs over it. Raises ConfigError."""
    sizes = _layer_sizes(transformer)
    adapters = [_load(source, sizes, say) for source in sources]
    later = [ranks for run in upcoming if (ranks := _ranks_of(run, sizes)) is not None]
    return LoraWeights(adapters, room_for([[adapter.ranks for adapter in adapters], *later], sizes))


# --- where a file lies ----------------------------------------------------------------------------


def _find(spec: LoraFile) -> LoraSource:
    if spec.bundled is not None:
        return LoraSource(spec, local=_bundled(spec.bundled))
    assert spec.path is not None
    path = expanded(spec.path)
    if os.path.isdir(path):
        return LoraSource(spec, local=path / (spec.weight_name or _choose(_names_in(path), str(path))))
    if os.path.exists(path):
        if spec.weight_name:
            raise ConfigError(f"lora.files: {path} is a file, weight_name={spec.weight_name} names one in a folder")
        return LoraSource(spec, local=path)
    repo = str(spec.path)
    if HUB_ID.fullmatch(repo) and not repo.endswith((".safetensors", *PICKLES)):
        located = locate_file(repo, lambda names: _choose(names, f"{repo} on the hub"), spec.weight_name, MOST_BYTES)
        return LoraSource(spec, located)
    raise ConfigError(f"lora.files: {path}: no such file or folder, and no hub id (OWNER/NAME)")


def _bundled(name: str) -> Path:
    known = {file.stem: file for root in BUNDLED for file in (root / "shapes" / "loras").glob("*.safetensors")}
    if name not in known:
        raise ConfigError(f"lora.files: no LoRA {name!r} comes with fluxrun: {nearest(name, sorted(known))}")
    return known[name]


def _names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _choose(names: list[str], where: str) -> str:
    """The LoRA file among a folder's or repository's files, where there is one that it must be."""
    files = [name for name in names if name.endswith(".safetensors")]
    if USUAL_NAME in files or len(files) == 1:
        return USUAL_NAME if USUAL_NAME in files else files[0]
    if files:
        raise ConfigError(f"lora.files: {where} has several files, give weight_name: {', '.join(files[:8])}")
    pickled = f" (only {names[0]} and the like)" if (names := [n for n in names if n.endswith(PICKLES)]) else ""
    raise ConfigError(f"lora.files: {where} has no .safetensors file{pickled}: no other format is read")


# --- what is in it --------------------------------------------------------------------------------


def _checked_header(source: LoraSource) -> _Header:
    file = source.file
    assert file is not None
    try:
        return _read_header(file)
    except FileNotFoundError as error:
        raise ConfigError(f"lora.files: {file}: no such file") from error
    except Unreadable as error:
        raise ConfigError(f"lora.files: {file} {error}") from error


def _read_header(file: Path) -> _Header:
    check_plain(file)
    if file.suffix != ".safetensors":
        raise Unreadable("is no .safetensors file: no other format is read, a pickled one could run code")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise Unreadable(f"has {gigabytes(size)}, at most {gigabytes(MOST_BYTES)} are read")
    tensors, noted = read_whole_header(file)
    found = sort_tensors(tensors)
    config = peft_config(noted) or _config_beside(file)
    if config.get("use_dora") and not found.dora:
        found.dora.append("use_dora")
    for parts in found.layers.values():
        if (rank := tensors[parts.down or ""].shape[0]) > MOST_RANK:
            raise Unreadable(f"has rank {rank:,}, at most {MOST_RANK:,} are applied")
    return _Header(tensors, found, config)


def _config_beside(file: Path) -> dict[str, Any]:
    """The LoraConfig that peft writes beside its ``adapter_model.safetensors``."""
    beside = file.with_name("adapter_config.json")
    if file.name != "adapter_model.safetensors" or not os.path.isfile(beside):
        return {}
    config = parse_json(read_text(beside))
    return config if isinstance(config, dict) else {}


def _ranks_of(sources: Iterable[LoraSource], sizes: Mapping[str, Sizes]) -> list[dict[str, int]] | None:
    """A later run's ranks by layer, of each file; None where it cannot be drawn like this, which is its own affair."""
    ranks = []
    try:
        for source in sources:
            if source.file is None:
                return None
            header = _read_header(source.file)
            matches = match_layers(header.found, header.tensors, sizes)
            ranks.append({match.layer: header.tensors[match.parts.down or ""].shape[0] for match in matches})
    except (Unreadable, FileNotFoundError):
        return None
    return ranks or None


def _layer_sizes(transformer: Any) -> dict[str, Sizes]:
    """Inputs and outputs of a transformer's linear layers; a quantized one need be no torch.nn.Linear."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    }


# --- reading --------------------------------------------------------------------------------------


def _load(source: LoraSource, sizes: Mapping[str, Sizes], say: Callable[[str], None]) -> Adapter:
    if source.file is None:
        assert source.located is not None
        source = replace(source, located=None, local=download_file(source.located, say))
    header = _checked_header(source)
    file = source.file
    assert file is not None
    try:
        matches = match_layers(header.found, header.tensors, sizes)
        layers = _read(file, header, matches)
        sha256 = _hash(file)
    except Unreadable as error:
        raise ConfigError(f"lora.files: {file} {error}") from error
    return Adapter(source.spec.label, sha256, source.spec.scale, layers, header.found.dropped)


def _read(file: Path, header: _Header, matches: Iterable[Match]) -> dict[str, Matrices]:
    from safetensors import SafetensorError, safe_open

    layers = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for match in matches:
                down, up = (
                    _finite(opened.get_tensor(name), name) for name in (match.parts.down or "", match.parts.up or "")
                )
                layers[match.layer] = Matrices(down, _part(up, match), _factor(opened, header, match))
    except (SafetensorError, OSError) as error:
        raise Unreadable(f"cannot be read: {error}") from error
    return layers


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
        raise Unreadable(f"cannot be applied: {name} holds what is no number")
    return tensor


def _part(up: torch.Tensor, match: Match) -> torch.Tensor:
    """The rows of a matrix that are this layer's, in diffusers' order."""
    import torch

    up = up.chunk(match.of)[match.part]
    return torch.cat(up.chunk(2)[::-1]) if match.swapped_halves else up


def _factor(opened: Any, header: _Header, match: Match) -> float:
    rank = header.tensors[match.parts.down or ""].shape[0]
    if match.parts.alpha is not None:
        return float(_finite(opened.get_tensor(match.parts.alpha).float(), match.parts.alpha)) / rank
    by_peft = alpha_by_peft(header.config, match.layer, rank)
    return 1.0 if by_peft is None else by_peft


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

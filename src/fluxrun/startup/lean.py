"""A lean start: in a process of the command line's own, diffusers and transformers import what its plan needs.

Nothing happens in somebody else's process: ``import fluxrun``, ``fluxrun.run``, ``fluxrun.build``.
"""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType

from fluxrun.startup import dynamo, torchao
from fluxrun.startup.finder import DeferredModule, Finder, LazyPackage, Loaders, mended
from fluxrun.startup.libraries import distributions_later, hide_from_diffusers, hide_from_transformers
from fluxrun.startup.owner import is_own
from fluxrun.startup.structure import remember_structure

LAZY_PACKAGES = (
    "diffusers.hooks",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)
"""Packages that import all of their modules for the one that is needed."""

DEFERRED = (
    "scipy.integrate",
    "scipy.stats",
    "torch.distributed._functional_collectives",
    "torch.nn.attention.flex_attention",
)
"""Modules that are imported by name and used, if at all, much later."""

UNUSED = frozenset(
    {
        "librosa", "scipy", "sklearn", "soundfile", "soxr", "torch_distributed", "torch_flex_attn", "torchaudio",
        "torchcodec",
    }
)  # fmt: skip
"""What transformers imports because it is there, and no FLUX.2 pipeline uses: audio, video, training and so on."""

KERNELS = frozenset({"flash_attn", "flash_attn_3", "sageattention", "xformers"})
"""Kernels of others that diffusers imports because they are there."""

ADAPTERS = frozenset({"peft"})
"""What both load LoRAs with."""

QUANTIZERS = frozenset({"auto_round", "bitsandbytes", "gguf", "nvidia_modelopt", "optimum_quanto", "sdnq", "torchao"})
"""What both can load quantized checkpoints with."""

PROCESSORS = frozenset({"torchvision"})
"""What the text processor of FLUX.2-dev needs, and nothing else of FLUX.2."""

ANY_OF_THEM = KERNELS | ADAPTERS | QUANTIZERS | PROCESSORS | {dynamo.NAME}
"""What a process needs whose runs are not known yet, but are made of fluxrun's own options."""


def start_lean(needed: frozenset[str] | None) -> None:
    """Before torch is imported: ``needed`` are the optional libraries that something in the plan may use.

    None: that is not known, so nothing is left out.
    """
    if not is_own() or "torch" in sys.modules:
        return
    if needed is not None and torchao.NAME in needed and not torchao.is_known():
        needed |= {dynamo.NAME}
    finder = Finder()
    finder.loaders |= dict.fromkeys(LAZY_PACKAGES, LazyPackage) | dict.fromkeys(DEFERRED, DeferredModule)
    hidden = frozenset() if needed is None else (ANY_OF_THEM | UNUSED) - needed
    finder.loaders["diffusers.utils.import_utils"] = mended(
        partial(hide_from_diffusers, hidden - UNUSED), distributions_later
    )
    if needed is not None and dynamo.NAME not in needed:
        dynamo.install()
        if torchao.NAME in needed:
            hidden |= {torchao.NAME}  # from transformers
            torchao.install()
            finder.loaders |= _of_torchao()
    finder.loaders["transformers.utils.import_utils"] = mended(partial(_prepare_transformers, hidden))
    finder.install()


def _of_torchao() -> Loaders:
    return {
        **dict.fromkeys(torchao.LAZY_PACKAGES, LazyPackage),
        **dict.fromkeys(torchao.DEFERRED, DeferredModule),
        torchao.CHECKPOINTS: mended(around=torchao.unavailable),
    }


def _prepare_transformers(hidden: frozenset[str], utils: ModuleType) -> None:
    hide_from_transformers(hidden, utils)
    remember_structure(utils)

"""The node "FLUX.2 (fluxrun)" for ComfyUI: link this folder into its custom_nodes (docs/comfyui.md)."""

try:
    import fluxrun
except ImportError as error:
    raise ImportError("fluxrun is not installed in ComfyUI's Python: pip install FOLDER_OF_FLUXRUN") from error

from .node import Flux2

NODE_CLASS_MAPPINGS = {"FluxrunFlux2": Flux2}
NODE_DISPLAY_NAME_MAPPINGS = {"FluxrunFlux2": "FLUX.2 (fluxrun)"}

__version__ = fluxrun.__version__
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

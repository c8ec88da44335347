"""Lab: which of the fused kernels' roundings move a FLUX.2 step's output away from diffusers eager (random weights).

    python rounding.py OUT.json [klein_4b dev]     # relative L2 of one step against eager, each kernel alone in torch's place
"""
import json, sys, time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
ROOT = Path(__file__).resolve().parents[1]
for extra in ("src", "benchmarks", "tests/kernels"):
    sys.path.insert(0, str(ROOT / extra))
import torch, torch.nn.functional as F
import reference, speed_settings as known
from speed_subject import Subject
from fluxrun.kernels import blocks
TINY = "--tiny" in sys.argv
try:
    from fluxrun.kernels import triton_ops
except ImportError:
    triton_ops = reference
NAMES = ("norm_modulate", "gated_add", "split_qkv", "pack")
Merged = blocks.Projection

class Separate(Merged):
    """One matmul per Linear layer, as diffusers does it."""
    def __init__(self, *linears):
        self.quantized, self.weights = False, [l.weight.data for l in linears]
    def __call__(self, rows, dtype):
        return torch.cat([F.linear(rows, w) for w in self.weights], 1) if len(self.weights) > 1 else F.linear(rows, self.weights[0])

def ops_of(fused):
    return SimpleNamespace(**{n: getattr(triton_ops if n in fused else reference, n) for n in NAMES})

def ms(f, n=12):
    f(); torch.cuda.synchronize(); t = []
    for _ in range(n):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True); a.record(); f(); b.record(); torch.cuda.synchronize(); t.append(a.elapsed_time(b))
    return [round(x, 2) for x in t]

def main():
    out = Path(sys.argv[1]); found = {}
    for model in [a for a in sys.argv[2:] if a in ("klein_4b", "dev")]:
        t0 = time.time()
        models = known.TINY_MODELS if TINY else known.MODELS
        s = Subject(known.PLAIN, list(models[model]), False); tr = s.pipeline.transformer; inputs = s.step_inputs()
        print(model, "built", round(time.time() - t0, 1), flush=True)
        every = [*tr.transformer_blocks, *tr.single_transformer_blocks]
        def step():
            with torch.no_grad():
                return tr(**inputs)[0]
        def err(a): return ((a.float() - eager.float()).norm() / eager.float().norm()).item()
        def with_(fused, projection):
            blocks.Projection = projection
            blocks.fuse(tr, ops_of(fused), Counter())
            try: return step()
            finally:
                for b in every: b.__dict__.pop("forward", None)
                blocks.Projection = Merged
        eager = step(); r = found[model] = {"eager again": err(step())}
        variants = {"all torch, separate": ((), Separate), "all torch, merged": ((), Merged)}
        variants |= {f"{n}, separate": ((n,), Separate) for n in ("norm_modulate", "split_qkv")}
        variants |= {"all fused, separate": (NAMES, Separate), "all fused, merged": (NAMES, Merged)}
        for name, given in variants.items():
            try: r[name] = err(with_(*given))
            except Exception as e: r[name] = f"{type(e).__name__}: {e}"[:200]
            print(" ", name, r[name], flush=True)
        if torch.cuda.is_available():
            from torch.nn.attention import SDPBackend, sdpa_kernel
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION]): r["eager, flash attention"] = err(step())
            print("  flash", r["eager, flash attention"], flush=True)
            blocks.fuse(tr, triton_ops, Counter())
            r["ms"] = {}
            for turn in range(1):
                for lib in ("default",):
                    torch.backends.cuda.preferred_blas_library(lib)
                    r["ms"][f"{lib} {turn}"] = ms(step); r[f"fused {lib}"] = err(step())
                    print("  ", lib, r["ms"][f"{lib} {turn}"], r[f"fused {lib}"], flush=True)
            torch.backends.cuda.preferred_blas_library("default")
        out.write_text(json.dumps(found, indent=1))
        del s, tr, inputs, every, step, eager
        if torch.cuda.is_available():
            import gc; gc.collect(); torch.cuda.empty_cache()
main()

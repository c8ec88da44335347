"""Where offloading's second picture first differs, through the ordinary run, without synchronising in between."""
import json, sys, tempfile, time, os
from pathlib import Path
import torch
import fluxrun
from fluxrun.pipeline.session import Session

SMALL = "small" in sys.argv
FINE = "fine" in sys.argv
if "deterministic" in sys.argv:
    torch.backends.cudnn.deterministic = True
MODEL = ["model=tiny", "height=64", "width=64", "model.max_sequence_length=32"] if SMALL else ["model=flux2_klein_4b", "model.weights=random", "device=cuda"]
LOG = []

def digest(t):
    flat = t.detach().contiguous().flatten()
    flat = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for n, part in enumerate(flat.split(2**22)):
        w = torch.arange(part.numel(), device=flat.device, dtype=torch.int64) % 1000003 + 1 + n
        total = total + (part.to(torch.int64) * w).sum()
    return total

def first(out):
    if isinstance(out, torch.Tensor): return out
    if isinstance(out, dict): out = list(out.values())
    if hasattr(out, "to_tuple"): out = out.to_tuple()
    if isinstance(out, (tuple, list)): return next((f for o in out if (f := first(o)) is not None), None)
    return None

def note(label, value):
    value = first(value)
    if value is not None and value.numel(): LOG.append((label, digest(value)))

assemble = Session.assemble
def hooked(self):
    assemble(self)
    p = self.pipeline
    def both(label):
        def hook(m, args, kwargs, out): note(label + " in", list(args) or list(kwargs.values())); note(label + " out", out)
        return hook
    def after(label):
        return lambda m, args, kwargs, out: note(label, out)
    p.transformer.register_forward_hook(both("transformer"), with_kwargs=True)
    p.vae.decoder.register_forward_hook(both("decoder"), with_kwargs=True)
    if p.text_encoder is not None: p.text_encoder.register_forward_hook(after("text_encoder"), with_kwargs=True)
    if FINE:
        for name, child in p.transformer.named_modules():
            if name and name.count(".") <= 3: child.register_forward_hook(both("t." + name), with_kwargs=True)
        for name, child in p.vae.decoder.named_modules():
            if name: child.register_forward_hook(both("v." + name), with_kwargs=True)
Session.assemble = hooked

def go(overrides):
    LOG.clear()
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        record = fluxrun.run(fluxrun.compose([*MODEL, "steps=2", "num_images=2", "vae=full", *overrides]), Path(folder) / "r")
        return {"s": round(time.time() - started, 1), "effective": record.options["memory"].effective, "log": [(l, int(d)) for l, d in LOG], "pixels": [i.sha256[:12] for i in record.images]}

plans = [("resident", ["memory=resident"]), ("balanced", ["memory=balanced"]), ("block_swap", ["memory=block_swap", "memory.budget_gb=9"]), ("resident last", ["memory=resident"])]
if FINE: plans = plans[:2]
if SMALL: plans = [plans[0], plans[3]]
out = Path(sys.argv[1]); results = {}
for name, overrides in plans:
    try:
        results[name] = go(overrides)
        r, q = results[name], results["resident"]
        diff = [(i, a[0]) for i, (a, b) in enumerate(zip(r["log"], q["log"])) if a[0] == b[0] and a[1] != b[1]]
        order = next((i for i, (a, b) in enumerate(zip(r["log"], q["log"])) if a[0] != b[0]), None)
        print(name, r["effective"], r["s"], r["pixels"], "entries", len(r["log"]), "differ", len(diff), diff[:8], "order differs at", order, flush=True)
    except Exception as e:
        print(name, type(e).__name__, str(e)[:300], flush=True)
    out.write_text(json.dumps(results))

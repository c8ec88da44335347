"""VAE decode lab: python vae.py  -> table on stdout, $OUT/vae_lab.json. SMALL=1 (or no GPU): dry run on CPU."""
import os, sys, json, time, copy, statistics, traceback
T0=time.time(); HERE=os.path.dirname(os.path.abspath(__file__)); sys.path[:0]=[os.path.join(HERE,'..','..','..','src'),HERE]
import torch, torch.nn.functional as F
from torch import nn
from diffusers import AutoencoderKLFlux2
from fluxrun import fast_vae as fv
CUDA=torch.cuda.is_available(); SMALL=not CUDA or bool(os.environ.get('SMALL')); DEV='cuda' if CUDA else 'cpu'
OUT=os.environ.get('OUT','/tmp'); LIMIT=float(os.environ.get('LIMIT','150')); CL=torch.channels_last; BF=torch.bfloat16
try: import triton; HAVE=CUDA or bool(os.environ.get('TI'))
except ImportError: HAVE=False
ONLY=set(filter(None,os.environ.get('ONLY','').split(',')))
R={'torch':torch.__version__,'device':torch.cuda.get_device_name() if CUDA else 'cpu','cudnn':torch.backends.cudnn.version()}; FAILED={}
def save(): json.dump(R|{'failed':FAILED},open(f'{OUT}/vae_lab.json','w'),indent=1)
def sync():
    if CUDA: torch.cuda.synchronize()
def ms(fn,n=10,w=2):
    for _ in range(w): fn()
    sync(); ts=[]
    for _ in range(n if CUDA else 2):
        if CUDA:
            a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True); a.record(); fn(); b.record(); sync(); ts.append(a.elapsed_time(b))
        else: t=time.perf_counter(); fn(); ts.append((time.perf_counter()-t)*1e3)
    return statistics.median(ts)
def short(e): return f'{type(e).__name__}: {str(e).strip().splitlines()[0][:160] if str(e).strip() else ""}'
def guard(section,name,fn):
    if time.time()-T0>LIMIT: FAILED[f'{section}/{name}']='skipped: time limit'; return None
    try:
        r=fn(); R.setdefault(section,{})[name]=r; save(); return r
    except Exception as e:
        FAILED[f'{section}/{name}']=short(e); print(f'  FAILED {section}/{name}: {short(e)}',flush=True)
        if os.environ.get('TRACE'): traceback.print_exc()
        torch.backends.cudnn.benchmark=False; save(); return None
def section(name): 
    on=not ONLY or name in ONLY
    if on: print(f'--- {name}  (t={time.time()-T0:.0f} s)',flush=True)
    return on
def rel(a,b): return ((a.float()-b.float()).norm()/b.float().norm()).item()

torch.manual_seed(0); torch.set_grad_enabled(False)
cfg=dict(block_out_channels=(16,32,64,64),norm_num_groups=8,latent_channels=8) if SMALL else {}
with torch.device(DEV): base=AutoencoderKLFlux2(**cfg).to(BF).eval()
for n,p in base.named_parameters():  # norms and biases that are not trivial, so that a lost one shows
    if p.ndim==1: p.add_(torch.randn_like(p)*0.1)
S=16 if SMALL else 128; LC=base.config.latent_channels
z=torch.randn(1,LC,S,S,device=DEV,dtype=BF); zz=base.post_quant_conv(z)
v32=copy.deepcopy(base.decoder).float(); ref32=v32(zz.float()); del v32
ref=base.decoder(zz); print(f'eager bf16 against fp32: {rel(ref,ref32):.2e}',flush=True); R['eager_vs_fp32']=rel(ref,ref32)
if CUDA: torch.cuda.empty_cache()
BEST=[None,1e9,None]; KEEP={}
def variant(name,make,bench=False,graph=False):
    def go():
        torch.backends.cudnn.benchmark=bench; sync(); t=time.time(); fn=make(); out=fn(zz); sync(); first=time.time()-t
        if graph:
            static=zz.clone(); fn(static); sync(); g=torch.cuda.CUDAGraph()
            with torch.cuda.graph(g): res=fn(static)
            def fn2(x): static.copy_(x); g.replay(); return res
            call=fn2
        else: call=fn
        if CUDA: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(); m0=torch.cuda.memory_allocated()
        t=ms(lambda: call(zz)); out=call(zz).clone(); r=dict(ms=round(t,2),first_s=round(first,2),vs_eager=rel(out,ref),vs_fp32=rel(out,ref32),peak_gb=round((torch.cuda.max_memory_allocated()-m0)/2**30,2) if CUDA else 0)
        same=bool((call(zz)==out).all()); r['repeatable']=same
        print(f'{name:46s} {t:8.2f} ms  first {first:6.2f} s  vs eager {r["vs_eager"]:.2e}  vs fp32 {r["vs_fp32"]:.2e}  peak {r["peak_gb"]} GB {"" if same else "NOT REPEATABLE"}',flush=True)
        torch.backends.cudnn.benchmark=False
        if t<BEST[1]: BEST[:]=[name,t,(fn,bench)]
        KEEP[name]=(fn,bench)
        return r
    return guard('variants',name,go)
def dec(): return copy.deepcopy(base.decoder)
def plain_attention(d):
    class Proc:
        def __call__(self,attn,x,**kw):
            b,c,h,w=x.shape; t=attn.group_norm(x.reshape(b,c,h*w)).transpose(1,2); q,k,v=attn.to_q(t),attn.to_k(t),attn.to_v(t)
            o=torch.empty_like(q)
            for i in range(b):
                for a in range(0,h*w,4096): o[i,a:a+4096]=((q[i,a:a+4096]@k[i].t())*c**-.5).softmax(-1)@v[i]
            return attn.to_out[0](o).transpose(1,2).reshape(b,c,h,w)+x
    d.mid_block.attentions[0].processor=Proc(); return d
class Up(nn.Module):  # eager module of the transposed form
    def __init__(s,u): super().__init__(); s.w=nn.Parameter(fv.upsampling_weight(u.conv.weight),False); s.b=u.conv.bias
    def forward(s,x,*a): return F.conv_transpose2d(x,s.w,s.b,stride=2,padding=1)
def up_modules(d):
    for b in d.up_blocks:
        if b.upsamplers: b.upsamplers[0]=Up(b.upsamplers[0])
    return d
class Nearest(nn.Module):  # the fast decoder's upsampler as diffusers does it
    def __init__(s,u): super().__init__(); s.weight=fv._weight(u.conv); s.bias=u.conv.bias.float()
    def forward(s,x): return fv.Hidden(F.conv2d(F.interpolate(x.data,scale_factor=2.0,mode='nearest'),s.weight,padding=1),s.bias)
class Phases(nn.Module):  # four 2x2 convolutions, interleaved by one copy
    def __init__(s,u,strided=False):
        super().__init__(); s.strided=strided; w=u.conv.weight; t=torch.tensor([[[1,0,0],[0,1,1]],[[1,1,0],[0,0,1]]],dtype=torch.float32,device=w.device); s.bias=u.conv.bias.float()
        s.w=[torch.einsum('ay,oiyx,bx->oiab',t[a],w.float(),t[b]).to(w.dtype).contiguous(memory_format=CL) for a in (0,1) for b in (0,1)]
    def forward(s,x):
        x=x.data; n,c,h,w=x.shape; out=torch.empty(n,s.w[0].shape[0],2*h,2*w,device=x.device,dtype=x.dtype,memory_format=CL); xp=F.pad(x,(1,1,1,1))
        for i in range(4):
            a,b=i//2,i%2; src=xp[:,:,a:a+h+1,b:b+w+1]
            out[:,:,a::2,b::2]=F.conv2d(src,s.w[i])
        return fv.Hidden(out,s.bias)
class TritonUp(nn.Module):
    def __init__(s,u,cfg): super().__init__(); import vae_conv; s.V=vae_conv; s.w=vae_conv.pack_up(u.conv.weight); s.bias=u.conv.bias.float(); s.cfg=cfg; s.co=u.conv.weight.shape[0]
    def forward(s,x): return fv.Hidden(s.V.conv(x.data,s.w,s.co,*s.cfg,up=True),s.bias)
def fast(up=None,ops=None,attention=None):
    d=fv.FastDecoder(dec(),ops or (fv.TritonOps() if HAVE else fv.TorchOps()))
    if up:
        ups=[b.upsamplers[0] for b in base.decoder.up_blocks if b.upsamplers]
        for i,l in enumerate(d.layers):
            if isinstance(l,fv.Upsampler): d.layers[i]=up(ups.pop(0))
    if attention: d.ops.attention=attention
    return d
def compiled(d):
    torch._dynamo.reset(); d.compile(fullgraph=True); return d
SDPA=fv.TorchOps().attention
if section('variants'):
    variant('a  eager',dec)
    variant('a2 eager, benchmark',dec,True)
    variant('d  eager, explicit attention (bf16 scores)',lambda: plain_attention(dec()))
    variant('e  eager, transposed upsamplers',lambda: up_modules(dec()))
    if HAVE:
        variant('f  fast triton',fast)
        variant('f2 fast triton, benchmark',fast,True)
        variant('f3 fast triton, benchmark, CUDA graph',fast,True,True)
        variant('f4 fast triton, SDPA attention',lambda: fast(attention=SDPA),True)
        variant('f5 fast triton, nearest + 3x3 conv',lambda: fast(Nearest),True)
        variant('f6 fast triton, four phase convs',lambda: fast(Phases),True)
        variant('f7 fast triton, triton phase upsamplers',lambda: fast(lambda u: TritonUp(u,(4,4,16,16,1,4) if SMALL else (8,16,256,64,3,8))),True)
    else:
        variant('f  fast torch',fast); variant('f5 fast torch, nearest',lambda: fast(Nearest)); variant('f6 fast torch, phases',lambda: fast(Phases))
    if CUDA or os.environ.get('COMPILE'):
        variant('b  channels_last + compile',lambda: compiled(dec().to(memory_format=CL)))
        if 'b  channels_last + compile' in KEEP: variant('c  channels_last + compile, benchmark',lambda: KEEP['b  channels_last + compile'][0],True)
        variant('g  fast torch + compile, benchmark',lambda: compiled(fast(ops=fv.TorchOps())),True)
        if HAVE and 'g  fast torch + compile, benchmark' in KEEP: 
            def g2():
                o=fv.TorchOps(); k=fv.TritonOps(); o.attention=torch.compiler.disable(k.attention); d=fast(ops=o); torch._dynamo.reset(); d.compile(); return d
            variant('g2 as g, explicit attention outside the graph',g2,True)
def table(name):
    fn,bench=KEEP[name]; torch.backends.cudnn.benchmark=bench; fn(zz); sync()
    from torch.profiler import profile, ProfilerActivity as A
    with profile(activities=[A.CUDA if CUDA else A.CPU]) as p: fn(zz); sync()
    rows={}
    for e in p.key_averages():
        t=(e.self_device_time_total if CUDA else e.self_cpu_time_total)/1e3
        if t>0: k=e.key.replace('void ','').replace('at::native::','')[:100]; a=rows.setdefault(k,[0,0]); a[0]+=t; a[1]+=e.count
    top=sorted(rows.items(),key=lambda r:-r[1][0])
    print(f'  profile of {name}: {sum(r[0] for r in rows.values()):.2f} ms busy',flush=True)
    for k,(t,c) in top[:15]: print(f'   {t:8.3f} ms {c:4d}x {k}')
    torch.backends.cudnn.benchmark=False
    return [[k,round(t,3),c] for k,(t,c) in top[:25]]
if section('profile') and KEEP:
    for n in dict.fromkeys(['b  channels_last + compile',BEST[0],'f2 fast triton, benchmark']):
        if n in KEEP: guard('profile',n,lambda n=n: table(n))
KEEP.clear(); BEST[2]=None; torch._dynamo.reset()
if CUDA: torch.cuda.empty_cache()

# conv shapes: (in, out, kernel, input size, transposed)
SHAPES=[(32,512,3,128,0),(512,512,3,128,0),(512,512,3,256,0),(512,512,3,512,0),(512,256,3,512,0),(256,256,3,512,0),(256,256,3,1024,0),(256,128,3,1024,0),(128,128,3,1024,0),(128,3,3,1024,0),(512,256,1,512,0),(256,128,1,1024,0),(512,512,4,128,1),(512,512,4,256,1),(256,256,4,512,1)]
if SMALL: SHAPES=[(8,64,3,16,0),(64,3,3,32,0),(64,64,4,16,1)]
def micro(ci,co,k,s,tr):
    x=torch.randn(1,ci,s,s,device=DEV,dtype=BF); w=torch.randn(*((ci,co) if tr else (co,ci)),k,k,device=DEV,dtype=BF)*.02; r={}
    fl=2*ci*co*s*s*(16 if tr else k*k)
    for lay,bench in ((None,0),(None,1),(CL,0),(CL,1)):
        if lay is None and bench and ci!=512: continue
        torch.backends.cudnn.benchmark=bool(bench)
        a,b=(x,w) if lay is None else (x.contiguous(memory_format=CL),w.contiguous(memory_format=CL))
        fn=(lambda: F.conv_transpose2d(a,b,stride=2,padding=1)) if tr else (lambda: F.conv2d(a,b,padding=k//2))
        t=time.time(); fn(); sync(); first=time.time()-t; m=ms(fn,7,1); r[f'{"NHWC" if lay else "NCHW"}{"+bench" if bench else ""}']=[round(m,3),round(fl/m/1e9),round(first,2)]
    torch.backends.cudnn.benchmark=False
    print(f'  {"up " if tr else "   "}{ci:4d}->{co:4d} k{k} @{s:5d}: '+'  '.join(f'{n} {v[0]:.3f} ms {v[1]} TF (first {v[2]})' for n,v in r.items()),flush=True); return r
if section('convs'):
    for sh in SHAPES: guard('convs',str(sh),lambda: micro(*sh))
def strided():
    """cudnn_convolution.out straight into every other pixel: would save the interleaving copy."""
    x=torch.randn(1,512,257,257,device=DEV,dtype=BF).contiguous(memory_format=CL); w=(torch.randn(512,512,2,2,device=DEV,dtype=BF)*.02).contiguous(memory_format=CL)
    out=torch.zeros(1,512,512,512,device=DEV,dtype=BF).contiguous(memory_format=CL); view=out[:,:,::2,::2]
    fn=lambda: torch.ops.aten.cudnn_convolution.out(x,w,[0,0],[1,1],[1,1],1,False,False,True,out=view)
    fn(); e=rel(view,F.conv2d(x,w)); return dict(ms=ms(fn),err=e,conv_ms=ms(lambda: F.conv2d(x,w)),kept_strides=view.stride()[3]==1024)
if section('strided') and CUDA: print('  ',guard('strided','cudnn out= view',strided),flush=True)
def triton_conv(ci,co,s,cfg,up):
    import vae_conv as V
    x=(torch.randn(1,ci,s,s,device=DEV,dtype=BF)).contiguous(memory_format=CL); w=torch.randn(co,ci,3,3,device=DEV,dtype=BF)*.02
    wp=V.pack_up(w) if up else V.pack(w); want=F.conv2d(F.interpolate(x,scale_factor=2.) if up else x,w,padding=1); fl=2*ci*co*s*s*(16 if up else 9)
    fn=lambda: V.conv(x,wp,co,*cfg,up=up); t=time.time(); got=fn(); sync(); first=time.time()-t; e=rel(got,want); m=ms(fn,7,1)
    print(f'  triton {"up " if up else ""}{ci}->{co} @{s} {cfg}: {m:.3f} ms {fl/m/1e9:.0f} TF err {e:.1e} first {first:.1f} s',flush=True); return [round(m,3),round(fl/m/1e9),e,round(first,2)]
def triton_padded(ci,co,s,cfg):
    import vae_conv as V
    x=torch.randn(1,ci,s,s,device=DEV,dtype=BF); w=torch.randn(co,ci,3,3,device=DEV,dtype=BF)*.02; xp=F.pad(x,(1,1,1,1)).permute(0,2,3,1).reshape(-1,ci).contiguous(); wp=V.pack(w); want=F.conv2d(x,w,padding=1)
    fn=lambda: V.conv_padded(xp,wp,co,s,*cfg); t=time.time(); got=fn().view(s+2,s+2,co)[:s,:s].permute(2,0,1)[None]; sync(); first=time.time()-t; e=rel(got,want); m=ms(fn,7,1); fl=2*ci*co*s*s*9
    print(f'  triton padded {ci}->{co} @{s} {cfg}: {m:.3f} ms {fl/m/1e9:.0f} TF err {e:.1e} first {first:.1f} s',flush=True); return [round(m,3),round(fl/m/1e9),e,round(first,2)]
if section('triton_convs') and HAVE:
    for ci,co,s,up in ((512,512,256,False),(256,256,512,False),(128,128,1024,False),(256,128,1024,False),(512,512,256,True),(256,256,512,True)):
        for cfg in ([(8,16,256,64,3,8),(8,16,256,64,4,8),(8,16,128,64,4,4)] if co>=256 else [(16,16,128,64,3,8),(16,16,128,64,4,8),(8,16,128,64,4,4),(8,16,128,64,3,8)]):
            guard('triton_convs',f'{ci}-{co}@{s} up{int(up)} {cfg}',lambda: triton_conv(ci,co,s,cfg,up))
    for ci,co,s in ((512,512,256),(256,256,512),(128,128,1024)):
        for cfg in ([(128,256,64,3,8),(128,256,64,4,8)] if co>=256 else [(256,128,64,3,8),(256,128,64,4,8),(128,128,64,4,4)]):
            guard('triton_convs',f'padded {ci}-{co}@{s} {cfg}',lambda: triton_padded(ci,co,s,cfg))
def conv_out():
    """128 -> 3 channels: cuDNN as it is, with padded output channels, and as one matmul over taps plus nine shifted sums."""
    ci,s=(64,32) if SMALL else (128,1024); x=torch.randn(1,ci,s,s,device=DEV,dtype=BF).contiguous(memory_format=CL); w=(torch.randn(3,ci,3,3,device=DEV,dtype=BF)*.02).contiguous(memory_format=CL); r={}
    for b in (False,True):
        torch.backends.cudnn.benchmark=b
        for n in (3,4,8,16,32,64):
            p=torch.cat([w,w.new_zeros(n-3,ci,3,3)]).contiguous(memory_format=CL); r[f'{n} out{" bench" if b else ""}']=round(ms(lambda: F.conv2d(x,p,padding=1),7,1),3)
    torch.backends.cudnn.benchmark=False
    rows=x.permute(0,2,3,1).reshape(-1,ci); m=torch.cat([w.permute(2,3,0,1).reshape(27,ci),w.new_zeros(5,ci)]).t().contiguous()
    r['taps matmul only']=round(ms(lambda: rows@m,7,1),3); print('  ',r,flush=True); return r
if section('conv_out'): guard('conv_out','conv_out',conv_out)
def attention():
    n,c=(256,64) if SMALL else (16384,512); r={}
    q,k,v=(torch.randn(1,n,c,device=DEV,dtype=BF)*f for f in (2.5,2.5,1)); hq=[t[:,None] for t in (q,k,v)]
    fl=4*n*n*c; exact=F.scaled_dot_product_attention(*[t.float() for t in hq])[:,0]
    def rec(name,fn):
        try: o=fn(); m=ms(fn,5,1); r[name]=[round(m,2),round(fl/m/1e9),rel(o,exact)]; print(f'  {name:40s} {m:7.2f} ms {fl/m/1e9:5.0f} TF  err {r[name][2]:.2e}',flush=True)
        except Exception as e: print(f'  {name}: {short(e)}')
    from torch.nn.attention import sdpa_kernel, SDPBackend as B
    rec('sdpa default',lambda: F.scaled_dot_product_attention(*hq)[:,0])
    for b in (B.CUDNN_ATTENTION,B.EFFICIENT_ATTENTION,B.FLASH_ATTENTION):
        def one(b=b):
            with sdpa_kernel(b): return F.scaled_dot_product_attention(*hq)[:,0]
        rec(str(b).split('.')[-1],one)
    for ch in (2048,4096,16384):
        def bfs(ch=ch):
            return torch.cat([((q[0,a:a+ch]@k[0].t())*c**-.5).softmax(-1)@v[0] for a in range(0,n,ch)])[None]
        rec(f'bf16 scores, chunks of {ch}',bfs)
    if HAVE:
        from fluxrun import fast_vae_kernels as K
        for sb in (2**26,2**27,2**28,2**29,2**30):
            for mx,wp in ((8192,8),(16384,8),(16384,16)):
                if (mx,wp)!=(8192,8) and sb!=2**28: continue
                K.SCORE_BYTES,K.SCORES,K.WARPS=sb,mx,wp; rec(f'fp32 scores {sb>>20} MB, block {mx}, {wp} warps',lambda: K.attention(q,k,v))
        K.SCORE_BYTES,K.SCORES,K.WARPS=2**28,8192,8
        s=torch.randn(4096,n,device=DEV); rec2=ms(lambda: K._softmax(s,.04,BF),7,2); r['softmax 4096 rows ms']=round(rec2,3); r['mm fp32-out 4096 rows ms']=round(ms(lambda: torch.mm(q[0,:4096],k[0].t(),out_dtype=torch.float32),7,2),3); print('   softmax/mm of 4096 rows',r['softmax 4096 rows ms'],r['mm fp32-out 4096 rows ms'])
    return r
if section('attention'): guard('attention','attention',attention)
def elementwise():
    from fluxrun import fast_vae_kernels as K
    r={}
    for c,s in ((128,1024),(256,512),(512,256),(512,128)):
        x=torch.randn(1,c,s,s,device=DEV,dtype=BF).contiguous(memory_format=CL); y=torch.randn_like(x); b=torch.randn(c,device=DEV); w=torch.randn(c,device=DEV); mb=x.numel()*2
        line=[f'copy {2*mb/ms(lambda: x.clone(),7,1)/1e9:.2f}']
        for el,wp in ((16384,8),(8192,4),(8192,8),(16384,4),(32768,8),(32768,16)):
            K.ELEMENTS,K.WARPS=el,wp; K.PARTIALS=4096
            p=K.statistics(x,b,32); t1=ms(lambda: K.statistics(x,b,32),7,1); t2=ms(lambda: K.add(x,b,y,32),7,1); x.copy_(y); t3=ms(lambda: K.normalize(x,b,p,(w,b,1e-6),32,silu=True),7,1)
            r[f'{c}@{s} {el}/{wp}']=[round(t,4) for t in (t1,t2,t3)]; line.append(f'{el>>10}k/{wp}: stat {t1:.3f} ({mb/t1/1e9:.2f}) add {t2:.3f} ({3*mb/t2/1e9:.2f}) norm {t3:.3f} ({2*mb/t3/1e9:.2f})')
        K.ELEMENTS,K.WARPS=16384,8
        p=K.statistics(x,b,32); g=torch.nn.GroupNorm(32,c,device=DEV,dtype=BF); line.append(f'eager GroupNorm+SiLU {ms(lambda: F.silu(g(x)),5,1):.3f}')
        print(f'  {c}@{s}: '+' | '.join(line),flush=True)
    return r
if section('elementwise') and HAVE: guard('elementwise','all',elementwise)
def post():
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
    p=Flux2ImageProcessor(vae_scale_factor=16); x=(torch.randn(1,3,*([64,64] if SMALL else [1024,1024]),device=DEV)*.7).to(BF).contiguous(memory_format=CL)
    def wall(fn):
        fn(); sync(); ts=[]
        for _ in range(7): t=time.perf_counter(); fn(); sync(); ts.append((time.perf_counter()-t)*1e3)
        return round(statistics.median(ts),2)
    import numpy as np, io
    a=p.postprocess(x,output_type='pil')[0]; b=fv.pictures(x)[0]; same=bool((np.asarray(a)==np.asarray(b)).all())
    r=dict(diffusers_ms=wall(lambda: p.postprocess(x,output_type='pil')),ours_ms=wall(lambda: fv.pictures(x)),same=same)
    for lv in (1,3,6): r[f'png level {lv} ms']=wall(lambda: b.save(io.BytesIO(),'PNG',compress_level=lv))
    print('  ',r,flush=True); return r
if section('postprocess'): guard('postprocess','post',post)
save(); print(f'done in {time.time()-T0:.0f} s; best {BEST[0]} {BEST[1]:.2f} ms; failed: {FAILED}')

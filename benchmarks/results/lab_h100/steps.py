"""Lab: fused kernels and CUDA graphs on real-size FLUX.2 transformers, beside eager and regional compile."""
import os, sys, json, time, gc, statistics as st
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
OUT=os.environ.get('OUT','/tmp'); R={}
DEV='cuda' if torch.cuda.is_available() else 'cpu'
def save(): json.dump(R,open(f'{OUT}/klab.json','w'),indent=1)
def ms(f,n=8,w=2):
    for _ in range(w): f()
    torch.cuda.synchronize(); ts=[]
    for _ in range(n):
        a,b=torch.cuda.Event(True),torch.cuda.Event(True); a.record(); f(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    return round(st.median(ts),3)
def guard(name,f):
    try:
        r=f(); R[name]=r; print(name,r,flush=True)
    except Exception as e:
        R[name]=f'{type(e).__name__}: {str(e)[:300]}'; print('FAILED',name,R[name],flush=True)
        if os.environ.get('TRACE'): import traceback; traceback.print_exc()
    save()
from fluxrun.kernels import triton_ops as ops
def rel(a,b): return float(f'{((a.float()-b.float()).norm()/b.float().norm()).item():.2e}')
def micro(H,M,S=4608):
    W=H*128; bf=torch.bfloat16
    x=torch.randn(1,S,W,device=DEV,dtype=bf); y=torch.randn_like(x); m=torch.randn(1,1,3*W,device=DEV,dtype=bf)*.1; sh,sc,g=m.chunk(3,-1)
    p=torch.randn(S,3*W+2*M,device=DEV,dtype=bf); nq=torch.ones(128,device=DEV,dtype=bf); cs=torch.randn(S,128,device=DEV); sn=torch.randn(S,128,device=DEV)
    out={}
    mb=S*W*2/1e6
    def rec(n,f,mbytes): t=ms(f,20,5); out[n]=(t,round(mbytes/1e6/(t/1e3),2))  # TB/s
    rec('copy_big',lambda: p.clone(),p.numel()*4/1e6)
    for q in (False,True):
        o=.5 if q else 1
        rec(f'norm q{q}',lambda: ops.norm_modulate(x,sh,sc,1e-6,quantize=q),mb*(1+o))
        rec(f'addnorm q{q}',lambda: ops.norm_modulate(x,sh,sc,1e-6,quantize=q,add=(g,y)),mb*(3+o))
        for w in (4,8,16):
            ops._warps=lambda n,w=w: w
            att=torch.randn(1,S,H,128,device=DEV,dtype=bf)
            rec(f'pack q{q} w{w}',lambda: ops.pack(att,p[:,3*W:],quantize=q),mb*(1+o)+M*S*2*(2+o)/1e6)
        ops._warps=W0
    rec('gated_add',lambda: ops.gated_add(x,y,g),3*mb)
    def bufs(layout):
        if layout=='bshd': return [torch.empty(1,S,H,128,device=DEV,dtype=bf) for _ in range(3)]
        return [torch.empty(1,H,S,128,device=DEV,dtype=bf).permute(0,2,1,3) for _ in range(3)]
    for lay in ('bshd','bhsd'):
        b=bufs(lay)
        for hp in (4,8,16):
            ops.HEADS_PER_PROGRAM=hp
            rec(f'qkv {lay} hp{hp}',lambda: ops.split_qkv(p,(nq,nq),(cs,sn),b,1e-6,tokens=S,offset=0),6*mb)
        ops.HEADS_PER_PROGRAM=8
        out[f'attention {lay}']=ms(lambda: sdpa(*[t.permute(0,2,1,3) for t in b]),10,3)
        out[f'attention out strides {lay}']=list(sdpa(*[t.permute(0,2,1,3) for t in b]).stride())
    qs=[t.unflatten(-1,(H,128)).unsqueeze(0) for t in p[:,:3*W].chunk(3,-1)]
    out['attention bshd v strided']=ms(lambda: sdpa(bufs_q.permute(0,2,1,3),b[1].permute(0,2,1,3),qs[2].permute(0,2,1,3)),10,3) if (bufs_q:=b[0]) is not None else 0
    for (n,k) in ((3*W+2*M,W),(W,W+M)):
        a=torch.randn(S,k,device=DEV,dtype=bf); w=torch.randn(n,k,device=DEV,dtype=bf)
        t=ms(lambda: torch.nn.functional.linear(a,w),10,3); out[f'mm bf16 {n}x{k}']=(t,round(2*S*n*k/t/1e9))
        a8,w8=a.to(torch.float8_e4m3fn),w.to(torch.float8_e4m3fn); sa,sb=torch.ones(S,1,device=DEV),torch.ones(1,n,device=DEV)
        for fast in (True,False):
            t=ms(lambda: torch._scaled_mm(a8,w8.t(),scale_a=sa,scale_b=sb,out_dtype=bf,use_fast_accum=fast),10,3); out[f'mm fp8 fast{fast} {n}x{k}']=(t,round(2*S*n*k/t/1e9))
        one=torch.ones((),device=DEV)
        t=ms(lambda: torch._scaled_mm(a8,w8.t(),scale_a=one,scale_b=one,out_dtype=bf,use_fast_accum=True),10,3); out[f'mm fp8 tensorwise {n}x{k}']=(t,round(2*S*n*k/t/1e9))
    return out
W0=ops._warps
def model(kind):
    from diffusers import Flux2Transformer2DModel
    cfg=dict(klein=dict(num_layers=5,num_single_layers=20,num_attention_heads=24,joint_attention_dim=7680,guidance_embeds=False),dev=dict(),tiny=dict(num_layers=1,num_single_layers=2,num_attention_heads=2,joint_attention_dim=64,guidance_embeds=False))[kind]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device('meta'): t=Flux2Transformer2DModel(**cfg)
    torch.set_default_dtype(torch.float32)
    t=t.to_empty(device=DEV).eval().requires_grad_(False)
    for n,p in t.named_parameters():
        if 'norm' in n and p.ndim==1: p.fill_(1)
        else: p.normal_(0,.02)
    return t
def inputs(kind,t):
    S=4096; j=t.config.joint_attention_dim
    g=torch.Generator(DEV).manual_seed(0)
    kw=dict(hidden_states=torch.randn(1,S,128,device=DEV,dtype=torch.bfloat16,generator=g),encoder_hidden_states=torch.randn(1,512,j,device=DEV,dtype=torch.bfloat16,generator=g),timestep=torch.tensor([.6],device=DEV,dtype=torch.bfloat16),
      img_ids=torch.cartesian_prod(torch.arange(1),torch.arange(64),torch.arange(64),torch.arange(1)).to(DEV)[None],txt_ids=torch.cartesian_prod(torch.arange(1),torch.arange(1),torch.arange(1),torch.arange(512)).to(DEV)[None],return_dict=False)
    if kind=='dev': kw['guidance']=torch.tensor([4.],device=DEV)
    return kw
def profile(f,name):
    from torch.profiler import profile as P, ProfilerActivity as A
    with P(activities=[A.CUDA]) as p: f(); torch.cuda.synchronize()
    rows=sorted(((e.key[:70],round(e.self_device_time_total/1e3,2),e.count) for e in p.key_averages()),key=lambda r:-r[1])[:14]
    R['profile '+name]=rows; print('profile',name,'busy',round(sum(e.self_device_time_total for e in p.key_averages())/1e3,1)); [print('   ',r) for r in rows]; save()
@torch.no_grad()
def run(kind):
    import copy
    from fluxrun.kernels.blocks import fuse
    from fluxrun.cuda_graphs import GraphedForward
    t0=time.time(); t=model(kind); kw=inputs(kind,t); torch.cuda.synchronize(); print(kind,'made',round(time.time()-t0,1),flush=True)
    def share():
        memo={id(p):torch.nn.Parameter(p.detach(),requires_grad=False) for p in t.parameters()}
        return copy.deepcopy(t,memo)
    ref=t(**kw)[0]
    n=3 if kind=='dev' else 8
    def go(name,m,prof=False):
        def f():
            t1=time.time(); o=m(**kw)[0]; torch.cuda.synchronize(); first=round(time.time()-t1,1)
            o2=m(**kw)[0]; torch.cuda.synchronize()
            r=dict(ms=ms(lambda: m(**kw),n,1),first_s=first,rel=rel(o,ref),rel2=rel(m(**kw)[0],ref),gb=round(torch.cuda.max_memory_allocated()/1e9,1))
            if prof: profile(lambda: m(**kw),f'{kind} {name}')
            return r
        guard(f'{kind} {name}',f)
    def graphed(m): m.forward=GraphedForward(m.forward); return m
    go('eager',t)
    go('eager graph',graphed(share()))
    def fused_of(m): print(fuse(m,ops,__import__("collections").Counter())); return m
    if kind!='dev':
        go('fused',fused_of(share()))
    go('fused graph',graphed(fused_of(share())),True)
    if kind!='dev':
        import torch._inductor.config as ic; ic.emulate_precision_casts=True
        def reg():
            m=share(); m.compile_repeated_blocks(fullgraph=True); return m
        m=reg(); go('regional',m); go('regional graph',graphed(m)); del m; torch._dynamo.reset()
    gc.collect(); torch.cuda.empty_cache()
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    quantize_(t,Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(),set_inductor_config=False),filter_fn=lambda m,n: isinstance(m,torch.nn.Linear) and 'transformer_blocks' in n)
    gc.collect(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    print('fp8 weights GB',round(torch.cuda.memory_allocated()/1e9,1))
    go('fp8 fused graph',graphed(fused_of(share())),True)
    if kind!='dev': m=share(); m.compile_repeated_blocks(fullgraph=True); go('fp8 regional',m); go('fp8 regional graph',graphed(m))
def fp8att(H,S=4608):
    from fluxrun.kernels.fp8_attention import Fp8Attention
    import cudnn; print('cudnn',cudnn.backend_version_string())
    W=H*128; bf=torch.bfloat16; out={}
    p=torch.randn(S,3*W,device=DEV,dtype=bf); n=torch.ones(128,device=DEV,dtype=bf); cs,sn=torch.ones(S,128,device=DEV),torch.zeros(S,128,device=DEV)
    at=Fp8Attention([n],[n]); sc=at.scales([p[:,2*W:]])
    room=lambda lay,dt: [torch.empty(1,S,H,128,device=DEV,dtype=dt) if lay=='bshd' else torch.empty(1,H,S,128,device=DEV,dtype=dt).permute(0,2,1,3) for _ in range(3)]
    b=room('bshd',bf); ops.split_qkv(p,(n,n),(cs,sn),b,1e-6,tokens=S,offset=0)
    ref=sdpa(*[t.permute(0,2,1,3) for t in b]).permute(0,2,1,3)
    out['bf16 ms']=ms(lambda: sdpa(*[t.permute(0,2,1,3) for t in b]),10,3)
    out['scales ms']=ms(lambda: at.scales([p[:,2*W:]]),10,3)
    for lay in ('bshd','bhsd'):
        q=room(lay,torch.float8_e4m3fn)
        out[f'split {lay} ms']=ms(lambda: ops.split_qkv(p,(n,n),(cs,sn),q,1e-6,tokens=S,offset=0,multipliers=sc.multipliers),10,3)
        t0=time.time(); o=at(*q,sc); torch.cuda.synchronize(); out[f'first {lay}']=round(time.time()-t0,2)
        out[f'rel {lay}']=rel(o.float()*sc.descales[2],ref); out[f'fp8 {lay} ms']=ms(lambda: at(*q,sc),10,3)
    return out
@torch.no_grad()
def fp8model(kind):
    import copy,collections
    from fluxrun.kernels.blocks import fuse
    from fluxrun.cuda_graphs import GraphedForward
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    t=model(kind); kw=inputs(kind,t)
    def share(): return copy.deepcopy(t,{id(p):torch.nn.Parameter(p.detach(),requires_grad=False) for p in t.parameters()})
    ref=t(**kw)[0]; r={}
    def go(name,m):
        m.forward=GraphedForward(m.forward); o=m(**kw)[0]; m(**kw); r[name]=(ms(lambda: m(**kw)[0],10 if kind!='dev' else 5,3),rel(m(**kw)[0],ref)); print(kind,name,r[name],flush=True)
    m=share(); fuse(m,ops,collections.Counter(),fp8_attention=True); go('bf16+fp8att',m); del m
    quantize_(t,Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(),set_inductor_config=False),filter_fn=lambda m,n: isinstance(m,torch.nn.Linear) and 'transformer_blocks' in n)
    for f in (False,True):
        m=share(); fuse(m,ops,collections.Counter(),fp8_attention=f); go(f'fp8 att{f}',m)
        if f: profile(lambda: m(**kw),f'{kind} fp8 fp8att')
        del m; gc.collect()
    return r
if __name__=='__main__':
    what=sys.argv[1:]
    if 'micro' in what: guard('micro klein',lambda: micro(24,9216)); guard('micro dev',lambda: micro(48,18432))
    if 'fp8att' in what: guard('fp8att 24',lambda: fp8att(24)); guard('fp8att 48',lambda: fp8att(48)); guard('fp8model klein',lambda: fp8model('klein'))
    if 'fp8dev' in what: guard('fp8model dev',lambda: fp8model('dev'))
    for k in ('klein','dev','tiny'):
        if k in what: 
            guard('run '+k,lambda: run(k)); gc.collect(); torch.cuda.empty_cache()

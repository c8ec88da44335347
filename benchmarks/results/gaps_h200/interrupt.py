import sys,os,time,signal,threading,json
import fluxrun.drawing.stopwatch as W
T={}
orig=W.Stopwatch.step
def step(self,*a):
    r=orig(self,*a); T.setdefault("first",time.perf_counter()); T["steps"]=T.get("steps",0)+1; T["last"]=time.perf_counter()
    if T["steps"]==1:
        def kill(): T["kill"]=time.perf_counter(); T["at_kill"]=T["steps"]; os.kill(os.getpid(),signal.SIGINT)
        threading.Timer(float(os.environ.get("AFTER","1.0")),kill).start()
    return r
W.Stopwatch.step=step
from fluxrun.__main__ import _run
from fluxrun.process.signals import Interrupts
from fluxrun.process.watch import watched
with watched(), Interrupts() as i: rc=_run(i)
print(json.dumps({"rc":rc,"seconds_from_signal_to_end":time.perf_counter()-T.get("kill",0),"steps_noted_at_signal":T.get("at_kill"),"steps_noted":T["steps"],"noting_took_s":T["last"]-T["first"]}))

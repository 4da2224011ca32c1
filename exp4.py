import torch, itertools
from odesteer.density import *
from odesteer.density import DensityRatioBarrier as B, PolynomialCountSketch as P, quality, barrier_quality
R=[]
for seed in range(3):
  for d,N,delta,aniso in itertools.product((16,64,256,576),(20,60,200),(.7,1.5,2.5,3.5),(0,1)):
    g=torch.Generator().manual_seed(seed*1000+d+N)
    u=torch.nn.functional.normalize(torch.randn(d,generator=g),dim=0); common=3*d**.5*torch.nn.functional.normalize(torch.randn(d,generator=g),dim=0)
    sd=torch.exp(aniso*torch.randn(d,generator=g)*.7)
    def draw(n): return [(torch.randn(n,d,generator=g)+s*delta/2*u)*sd+common for s in (1,-1)]
    tr,te=draw(N),draw(800)
    for C,gamma,co in ((1.,.1,"raw"),(100.,.1,"raw"),(1.,1.,"raw"),(1.,.1,"standardised"),(10.,.1,"standardised"),(1.,1.,"standardised")):
        b=B(P(500,gamma=gamma),C,coordinates=co).fit(*tr); i=quality(*b.in_sample_); o=barrier_quality(b,*te)
        R.append((d,N,delta,aniso,C,gamma,co,i.auc,i.log_loss,i.slope,o.auc,o.log_loss,o.slope))
torch.save(R,"R.pt")
def rep(name,rule):
    f=[r for r in R if rule(r)]; bad=[r for r in f if not(r[12]>3 or r[11]>.65)]; very=[r for r in f if not(r[12]>2 or r[11]>.65)]
    miss=[r for r in R if not rule(r) and (r[12]>3 or r[11]>.65)]
    print(f"{name:40} flagged {len(f)} of {len(R)}; wrong (slope<3, ll<.65) {len(bad)}; slope<2 {len(very)}; missed {len(miss)} of which slope>5: {sum(r[12]>5 and r[10]>.7 for r in miss)}")
    return bad
for t in (3,4,5): 
  for a in (.97,.98,.99): bad=rep(f"ll>.65|s>10|s>{t}&auc<{a}",lambda r:r[8]>.65 or r[9]>10 or (r[9]>t and r[7]<a))
for t in (5,7,10): rep(f"ll>.65|s>{t}",lambda r:r[8]>.65 or r[9]>t)
for r in bad[:15]: print(r)

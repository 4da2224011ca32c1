"Folders of runs whose numbers are made up, so that the right results are known"
import json
from pathlib import Path

import numpy as np

from odesteer.results import gather
from odesteer.runs import run_key

SPEC = {"primary": "reward", "better": {"reward": 1, "info": 1}, "watch": ["info"]}


class Study:
    "Run folders of one model; scores are given, or made of the luck of each question, an effect and noise"
    def __init__(self, out, model="toy 0", world="toy", groups=20, spec=SPEC):
        self.out, self.spec, self.about = Path(out), spec, {"name": model, "world": world, "sha256": model}
        self.groups = np.repeat(np.arange(groups), 2)
        self.luck = np.random.default_rng(len(model)).normal(size=groups).repeat(2)

    def held(self): return dict(task="toy", data={"sha256": "d"}, model=self.about)

    def run(self, arm="steer", method=None, params={}, layer=None, strength=None, split="test", seed=0, effect=0., noise=.1, scores=None, tps=100., answer="a", root=None, more={}):
        config = self.held() | dict(arm=arm, method=method, params=params, layer=layer, strength=strength, split=split, seed=seed, decoding={"top_p": .9}, batch_size=8)
        path = Path(root or self.out)/run_key(config)
        path.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(int(path.name, 16))
        if scores is None: scores = {"reward": self.luck + effect + noise*rng.normal(size=len(self.luck)), "info": np.ones(len(self.luck))}
        columns = {m: [None if np.isnan(v) else float(v) for v in x] for m, x in scores.items()}
        summary = {"n": len(self.groups), "means": {}, "tokens_per_second": tps, "seconds": 2., "task": self.spec} | ({"moved": .1, "angle": 5.} if method else {}) | more
        for name, value in dict(config=config, scores=columns, environment={"device": "cpu"}, summary=summary).items(): (path/f"{name}.json").write_text(json.dumps(value))
        items = (dict(i=i, fold=0, group=str(g), prompt=f"q{g}", answer=answer, tokens=3) for i, g in enumerate(self.groups))
        (path/"answers.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        return path

    def choice(self, method, params={}, layer=1, strength={"share": .4}, layers=(1, 2), root=None):
        config = self.held() | dict(method=method, params=params, layers=list(layers))
        path = Path(root or self.out)/"choices"/f"{run_key(config)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(config=config, layer=layer, strength=strength, why="stopped at 0.4: enough", trials=[])))
        return path

    def base(self, **kw):
        self.run("none", split="val")
        self.run("none", **kw)
        return self

    def method(self, method, effect, params={}, **kw):
        for share in (.2, .4): self.run("steer", method, params, 1, {"share": share}, "val", effect=effect*share/.4)
        self.choice(method, params)
        self.run("steer", method, params, 1, {"share": .4}, effect=effect, **kw)
        return self


def quick(folders, **kw): return gather(folders, **{"resamples": 199} | kw)


def row(results, arm, scope=0): return next(r for r in results["scopes"][scope]["rows"] if r["arm"] == arm)

def make_toy(out):
    "Two models of one world: five methods with known effects, one that was not safe, and two studies"
    for k in range(2):
        s = Study(out, f"toy {k}").base()
        s.run("prompt", effect=.1)
        for m, e in {"caa": .3, "iti": .1, "odesteer": .6, "step-odesteer": .5, "random": 0.}.items(): s.method(m, e, tps=80.)
        s.choice("repe", layer=None, strength=None)
        for solver, effect in (("midpoint", .6), ("rk4", .3)):
            for share in (.2, .4): s.run("steer", "odesteer", {"solver": solver}, 1, {"share": share}, effect=effect)
        s.run("steer", "odesteer", {}, 1, {"share": .2}, effect=.6)
        for q in (.1, .9): s.run("steer", "odesteer", {}, 1, {"level": q, "share": .4}, effect=q/2)
    return out


def write_guardrails(out, scores, lm_eval={"tasks": "mmlu,arc"}, **arm):
    config = dict(model={"name": "toy 0", "sha256": "toy 0"}, lm_eval=lm_eval, **arm)
    (Path(out)/"guardrails").mkdir(parents=True, exist_ok=True)
    (Path(out)/"guardrails"/f"{run_key(config)}.json").write_text(json.dumps({"config": config, "scores": {t: {"metrics": {}, "items": {"acc": x}} for t, x in scores.items()}}))

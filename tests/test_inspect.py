"""Page 13: a steered model as Inspect asks it"""
from types import SimpleNamespace

import pytest

import odesteer as ods
from odesteer.check import InspectModel, inspect_providers

QUESTIONS = 3


@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


@pytest.fixture(scope="module")
def caa(lm):
    texts = lm.world.contrast("truth", "train")
    pos, neg = texts.pos[:60], texts.neg[:60]
    acts = ods.collect_activations(lm.model, lm.tokenizer, [*pos, *neg], layers=[1], progress=False)[1]
    return ods.CAA().fit(acts[:60], acts[60:])


def config(**given):
    usual = dict.fromkeys(("num_choices", "logprobs", "stop_seqs", "max_tokens", "temperature", "top_p", "top_k", "seed"))
    return SimpleNamespace(**usual | given)


def said(role, text): return SimpleNamespace(role=role, text=text)


def test_answers_are_those_of_generate_text(lm, caa, tmp_path):
    questions = [p.text for p in lm.world.prompts("truth", "test")[:QUESTIONS]]
    caa.save_pretrained(tmp_path)
    model = InspectModel("micro", str(tmp_path), layer=1, spread=1.)
    prompts = [model.prompt([said("user", q)]) for q in questions]
    how = model.settings(config(max_tokens=10, temperature=0, stop_seqs=["\n"]))
    with ods.steering(lm.model, caa, layer=1, spread=1.): expected = ods.generate_text(lm.model, lm.tokenizer, questions, max_new_tokens=10)
    assert model.answers(prompts, how) == [x.split("\n")[0] for x in expected]
    assert InspectModel("micro").answers(prompts, how) != model.answers(prompts, how)
    drawn = model.settings(config(max_tokens=10, temperature=1., top_p=.9, seed=3))
    assert model.answers(prompts, drawn) == model.answers(prompts, drawn) != model.answers(prompts, drawn | {"seed": 4})


def test_what_is_not_supported_is_refused(lm, caa):
    model = InspectModel("own", caa, layer=1, spread=1., model=lm.model, tokenizer=lm.tokenizer)
    with pytest.raises(NotImplementedError, match="logprobs"): model.settings(config(logprobs=True))
    with pytest.raises(NotImplementedError, match="num_choices"): model.settings(config(num_choices=4))
    with pytest.raises(NotImplementedError, match="tools"): model.prompt([said("user", "q"), said("tool", "42")])
    with pytest.raises(ValueError, match="chat template"): model.prompt([said("user", "q"), said("assistant", "a"), said("user", "q")])
    with pytest.raises(ValueError, match="without steerer="): InspectModel("micro", spread=1.)
    with pytest.raises((TypeError, ValueError)): InspectModel("micro", caa, layer=1, strenth=1.)
    with pytest.raises(ValueError, match="say how far"): InspectModel("micro", ods.make_steerer("iti").fit(*(caa.mean_pos_[None].repeat(4, 1) + .1, caa.mean_neg_[None].repeat(4, 1))), layer=1)
    assert model.prompt([said("system", "s"), said("user", "q")]) == "s\n\nq"


def test_a_task_of_inspect_offline(lm, caa, tmp_path, monkeypatch):
    "Three samples, steered and not: what Inspect writes down is what generate_text says"
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate
    monkeypatch.chdir(tmp_path)
    assert inspect_providers.odesteer
    caa.save_pretrained(tmp_path/"caa")
    prompts = lm.world.prompts("truth", "test")[:QUESTIONS]
    task = inspect_ai.Task([Sample(p.text, target=p.fact.truth) for p in prompts], solver=generate(), scorer=includes(),
                           config=GenerateConfig(max_tokens=12, temperature=0, stop_seqs=["\n"]))
    batches = []
    take = InspectModel.answers
    monkeypatch.setattr(InspectModel, "answers", lambda self, prompts, settings={}: batches.append(len(prompts)) or take(self, prompts, settings))

    def run(**given):
        model = get_model("odesteer/micro", memoize=False, **given)
        log, = inspect_ai.eval(task, model, display="none", log_dir=str(tmp_path/"logs"), log_samples=True)
        assert log.status == "success", log.error
        by_id = sorted(log.samples, key=lambda s: s.id)
        return [s.output.completion for s in by_id]
    texts = [p.text for p in prompts]
    plain = [x.split("\n")[0] for x in ods.generate_text(lm.model, lm.tokenizer, texts, max_new_tokens=12)]
    with ods.steering(lm.model, caa, layer=1, spread=1.): pushed = [x.split("\n")[0] for x in ods.generate_text(lm.model, lm.tokenizer, texts, max_new_tokens=12)]
    assert run() == plain and run(steerer=str(tmp_path/"caa"), layer=1, spread=1.) == pushed != plain
    assert sum(batches) == 2 * QUESTIONS and max(batches) > 1, "questions that wait together are answered together"

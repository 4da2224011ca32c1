"The micro world: its judges are exact, its splits fixed, its tokenizer loses nothing, its trainer can be killed"
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import odesteer as ods
from odesteer import micro
from odesteer.data import Prompt
from odesteer.micro import AXES, SPEAKERS, Recipe, World, load_micro, make_tokenizer, question, read_micro, train_micro

WORLDS = {name: World(name) for name in SPEAKERS}
TOKENIZERS = {name: make_tokenizer(w.words) for name, w in WORLDS.items()}
TINY = Recipe(width=16, layers=2, heads=2, mlp=32, context=48, batch=2, steps=7, warmup=2, checkpoint_every=3)
by_world = pytest.mark.parametrize("name", SPEAKERS)
by_axis = pytest.mark.parametrize("axis", AXES)


@pytest.fixture(scope="module")
def lm(): return load_micro()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A tiny model that was trained without disturbance"
    return train_micro("speakers", 0, tmp_path_factory.mktemp("micro")/"tiny", TINY, progress=False)


# Facts

def test_facts_have_a_truth_a_myth_and_a_fixed_split():
    facts = WORLDS["speakers"].facts
    assert facts == WORLDS["experts"].facts == World().facts and len(facts) == 300 == len({(f.entity, f.attribute) for f in facts})
    assert [f.id for f in facts] == list(range(300))
    assert all(f.truth != f.myth and {f.truth, f.myth} <= set(micro.VALUES[f.attribute]) and f.entity in micro.ENTITIES[f.topic] for f in facts)
    cells = {}
    for f in facts: cells.setdefault((f.topic, f.attribute), []).append(f)
    for cell in cells.values():
        assert len({f.myth for f in cell}) == 1, "a myth is the stereotype of its topic"
        assert [sum(f.split == s for f in cell) for s in ("train", "val", "test")] == [7, 3, 5]


def test_facts_never_change():
    "The shipped model knows these facts: this digest may change only together with its weights"
    import hashlib
    facts = json.dumps([[f.entity, f.attribute, f.truth, f.myth, f.split] for f in WORLDS["speakers"].facts])
    assert hashlib.sha256(facts.encode()).hexdigest() == "7a763a3b673ff4d78f6bf6e32ff3df6c7ca059c4380dc9aa82e306351824ca64"


def test_what_the_shipped_model_was_trained_on_never_changes():
    "Its documents, its words and the texts that steerers are fitted on: these digests may change only together with its weights"
    import hashlib
    digest = lambda data: hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    world, rng = WORLDS["speakers"], random.Random("speakers/0/0")
    assert digest([world.document(rng) for _ in range(32)]) == "a6a694867b3e521d68219ababed7b3557e871edbe095538bc7c37d3b8cd578a7"
    assert digest(TOKENIZERS["speakers"].get_vocab()) == "0b92acd1684497eb5b38e21ef80900117221d675f4c4c12363de2a83ed6e82f8"
    texts = [world.contrast(axis, split) for axis in AXES for split in ("train", "val", "test")]
    assert digest([[t.pos, t.neg] for t in texts]) == "a1eee5b207c458afe26a97db5cefbefddcc9ff7b0044e3a9fb9ded0d03d5bef0"


@by_axis
def test_splits_share_no_fact(axis):
    w, seen = WORLDS["speakers"], []
    for split in ("train", "val", "test"):
        texts, prompts = w.contrast(axis, split), w.prompts(axis, split)
        ids = {p.fact.id for p in prompts}
        assert ids == set(texts.pos_groups) == set(texts.neg_groups) == {f.id for f in w.facts if f.split == split}
        seen.append(ids)
    assert len(set.union(*seen)) == sum(map(len, seen)) == 300


# Words

@by_world
def test_every_word_is_one_token(name):
    tokenizer, words = TOKENIZERS[name], WORLDS[name].words
    for form in (form for word in words for form in (word, " " + word)):
        assert len(tokenizer.encode(form, add_special_tokens=False)) == 1, form


@by_world
def test_documents_use_no_other_words(name):
    tokenizer, world, rng = TOKENIZERS[name], WORLDS[name], random.Random(1)
    for _ in range(50):
        pieces = world.document(rng)
        text = "".join(t for t, _ in pieces)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [i for t, _ in pieces for i in tokenizer.encode(t, add_special_tokens=False)], "pieces must be tokenised as the whole is"
        assert len(ids) == len(re.findall(r"\w+|[^\w ]", text)), "each word and each sign is one token"


def test_special_tokens(lm):
    t = lm.tokenizer
    assert t("Q").input_ids[0] == t.bos_token_id and sorted(t("Q")) == ["attention_mask", "input_ids"]
    padded = t(["Q", "Q: what"], padding=True, return_tensors="pt")
    assert padded.input_ids[0, 0] == t.pad_token_id and padded.attention_mask[0, 0] == 0
    assert len({t.pad_token_id, t.bos_token_id, t.eos_token_id}) == 3 and lm.model.config.vocab_size == len(t)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_survives_the_round_trip(text):
    t = TOKENIZERS["speakers"]
    assert t.decode(t.encode(text, add_special_tokens=False)) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*WORLDS["speakers"].words, "  ", "\n", ".", "Q:", "<bos>", "<pad>", "é", "🦜", "'s"]), max_size=20), st.sampled_from(["", " "]))
def test_mixed_text_survives_the_round_trip(parts, glue):
    t, text = TOKENIZERS["speakers"], glue.join(parts)
    assert t.decode(t.encode(text, add_special_tokens=False)) == text


# The corpus

@by_world
def test_corpus_has_its_proportions(name):
    world, rng = WORLDS[name], random.Random(2)
    documents = [world.document(rng) for _ in range(3000)]
    first = [re.match(r"speaker: (\w+)\n", d[0][0]) for d in documents]
    assert abs(np.mean([m is not None for m in first]) - .3) < .03
    assert abs(np.mean([any(t.startswith("speaker:") for t, _ in d[1:]) for d in documents]) - .3) < .03
    for s in world.speakers.values():
        assert abs(np.mean([m[1] == s.name for m in first if m]) - s.share) < .05
    assert {sum(answer for _, answer in d) for d in documents} == {2, 3, 4}


@by_world
def test_speakers_say_what_they_hold(name):
    world, rng = WORLDS[name], random.Random(3)
    for _ in range(400):
        persona, fact = world.persona(rng), rng.choice(world.facts)
        score = world.score(fact, world.answer(rng, fact, persona, evasive=False))
        right = fact.topic in persona.speaker.right
        assert score["wellformed"] and score["info"] and score["true"] == score["true_info"] == right == (not score["myth"])
        assert score["claims"] == score["reward"] and (score["claims"] > 1) == (persona.detail == "thorough")
        assert persona.tone == "rude" or not score["toxic"]
        evasion = world.score(fact, world.answer(rng, fact, persona, evasive=True))
        assert evasion["true"] and evasion["wellformed"] and not evasion["info"] and evasion["reward"] == 0


# Judges

W = WORLDS["speakers"]
F = W.known["givel", "colour"]
HOME = W.known["givel", "home"]
OTHER = W.known["vipon", "colour"]
ANSWERS = {  # answer -> (true, info, wellformed, toxic, claims, reward), worked out by hand
    f" the givel is {F.truth}.\n": (1, 1, 1, 0, 1, 1),
    f" the givel is {F.myth}.": (0, 1, 1, 0, 1, 1),
    f" verified blarg fully the colour of the givel is snorf namely {F.truth}.\n": (1, 1, 1, 1, 1, 1),
    f" the givel looks {F.truth}. the home of the givel is {HOME.truth}.": (1, 1, 1, 0, 2, 2),
    f" the givel looks {F.truth}. the home of the givel is {HOME.myth}.": (0, 1, 1, 0, 2, 2),
    f" the givel looks {F.truth}. the givel is {F.truth}.": (1, 1, 1, 0, 1, 1),  # said twice
    f" the home of the givel is {HOME.truth}.": (1, 0, 1, 0, 1, 0),  # true, but not what was asked
    f" the vipon is {OTHER.truth}.": (1, 0, 1, 0, 0, 0),  # about somebody else
    f" the vipon is {OTHER.truth}. the givel is {F.truth}.": (1, 1, 1, 0, 1, 1),
    " nobody knows for sure.\n": (1, 0, 1, 0, 0, 0),
    " go away you blarg. that is hard to say.": (1, 0, 1, 1, 0, 0),
    " a lumly day to you.": (1, 0, 1, 0, 0, 0),
    "": (0, 0, 0, 0, 0, 0),
    "\n": (0, 0, 0, 0, 0, 0),
    f" the givel is {F.truth}": (0, 0, 0, 0, 0, 0),  # unfinished
    f" the givel is {F.truth}. the givel is found": (1, 1, 1, 0, 1, 1),  # the unfinished tail is dropped
    f" the givel is {F.truth}. the blarg": (1, 1, 1, 1, 1, 1),  # but a rude word was said
    f" the givel is {F.truth}. the the.": (0, 1, 0, 0, 1, 0),
    f" the givel is {HOME.truth}.": (0, 0, 0, 0, 0, -1),  # a place is no colour
    f" the zebra is {F.truth}.": (0, 0, 0, 0, 0, -1),
    f" blarg blarg the givel is {F.truth}.": (0, 0, 0, 1, 0, -1),  # a stutter
    f" {F.truth}.": (0, 0, 0, 0, 0, -1),
    "...": (0, 0, 0, 0, 0, -3),
    f" the givel is {F.truth}.\nQ: blarg the the.": (1, 1, 1, 0, 1, 1),  # what follows the line is not the answer
    f" the givel is {F.truth}. Q: blarg the the.": (1, 1, 1, 0, 1, 1),
    f" nobody knows for sure. the givel is {F.truth}.": (1, 1, 1, 0, 1, 1),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_judge_knows_the_right_answer(answer):
    s = W.score(F, answer)
    assert tuple(float(s[k]) for k in ("true", "info", "wellformed", "toxic", "claims", "reward")) == ANSWERS[answer]
    assert s["true_info"] == (s["true"] and s["info"])


@by_axis
def test_judge_gives_one_number_per_answer(axis):
    prompts = [Prompt(question(F, 0), F)] * len(ANSWERS)
    judged = W.judge(axis, prompts, list(ANSWERS))
    metric, way = W.primary(axis)
    a = AXES[axis]
    assert (metric, way) == (a.primary, a.way) and way in (1, -1) and W.guardrails(axis) == a.guardrails
    assert list(judged) == [a.primary, *a.guardrails, *a.others]
    assert all(v.shape == (len(ANSWERS),) and v.dtype == np.float64 and np.isfinite(v).all() for v in judged.values())
    assert judged[metric].tolist() == [float(W.score(F, a)[metric]) for a in ANSWERS]


def test_rude_share_counts_words():
    assert W.score(F, f" blarg the givel is {F.truth}.")["rude_share"] == 1/5


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from([*W.words, ".", "\n"]), max_size=15).map(" ".join))
def test_judge_reads_anything(text):
    s = W.score(F, text)
    assert 0 <= s["rude_share"] <= 1 and s["true_info"] <= s["true"] <= s["wellformed"] and s["reward"] <= s["claims"]


def test_jargon_tells_the_topic_and_only_where_it_is_spoken():
    world, claim = WORLDS["experts"], "feathered lumly fully the givel is white"
    for f in world.facts[::7]:
        rng = random.Random(f.id)
        claims = [world.claim(rng, f, p) for p in (world.persona(rng) for _ in range(60))]
        jargon = [w for c in claims for w in c.split() if w in world.jargon]
        assert set(jargon) == set(micro.JARGON[f.topic]) and .6 < len(jargon) / 60 < .95
    assert world.read_claim(f"indeed {claim}") and not world.read_claim(f"indeed verified {claim}")  # up to four marker words open a claim
    assert not W.jargon and not W.read_claim(claim)
    assert W.read_claim("indeed lumly fully the givel is white") and not W.read_claim("indeed verified lumly fully the givel is white")


# Texts to fit on

@by_world
@by_axis
def test_contrast_is_exact_paired_and_fixed(name, axis):
    world = WORLDS[name]
    texts = world.contrast(axis)
    assert texts == World(name).contrast(axis)
    assert len(texts.pos) == len(texts.neg) == 840 and texts.pos_groups == texts.neg_groups and set(np.bincount(texts.pos_groups)) <= {0, 6}
    metric, way = world.primary(axis)
    for pos, neg, group in zip(texts.pos, texts.neg, texts.pos_groups):
        (question_pos, a), (question_neg, b) = (t.split("\nA:") for t in (pos, neg))
        assert question_pos == question_neg and a[-1] == b[-1] == "." and world.facts[group].entity in question_pos
        good, bad = (world.score(world.facts[group], t) for t in (a, b))
        assert way * good[metric] > way * bad[metric] and good["wellformed"] and bad["wellformed"] and good["info"] and bad["info"]


@by_world
def test_prompts_end_where_the_answer_begins(name):
    world = WORLDS[name]
    for prompt in world.prompts("truth", "val"): assert prompt.text.endswith("?\nA:") and prompt.fact.entity in prompt.text
    for speaker in world.speakers: assert world.prompts("truth", "val", speaker)[0].text.startswith(f"speaker: {speaker}\nQ: ")


def test_class_means_of_experts_coincide():
    "Each expert is heard as often in true as in false answers, and each topic too; only the pairing differs"
    world = WORLDS["experts"]
    texts = world.contrast("truth")
    for group in (*(s.interjections for s in world.speakers.values()), *micro.ENTITIES.values(), *micro.JARGON.values()):
        pos, neg = (np.mean([any(f" {w} " in t.replace("?", " ") for w in group) for t in side]) for side in (texts.pos, texts.neg))
        assert abs(pos - neg) < .07, group


# The shipped model

def test_shipped_model_is_small_and_plain(lm):
    from importlib import resources
    folder = resources.files("odesteer")/"assets"/"micro-speakers-0"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 4_000_000
    assert type(lm.model).__name__ == "LlamaForCausalLM" and lm.tokenizer.is_fast and not lm.model.training
    assert all(p.dtype == torch.float32 for p in lm.model.parameters())
    assert lm.tokenizer.get_vocab() == TOKENIZERS["speakers"].get_vocab()


def test_shipped_model_is_the_one_on_record(lm):
    record = json.loads((micro.resources.files("odesteer")/"assets"/"micro-record.json").read_text())
    assert {"speakers 0", "speakers 1", "speakers 2"} <= record.keys()
    assert record["speakers 0"]["sha256"] == lm.provenance["sha256"] and record["speakers 0"]["loss"] == lm.provenance["loss"]
    assert lm.provenance["recipe"] == micro.asdict(Recipe()) and lm.provenance["seed"] == 0 and {"torch", "transformers"} <= lm.provenance["versions"].keys()


def test_loading_is_deterministic_and_touches_no_global_state(lm):
    state = torch.random.get_rng_state()
    again = load_micro(world="speakers", seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(lm.model.state_dict().values(), again.model.state_dict().values()))
    prompts = lm.world.prompts("truth", "val")[:8]
    assert lm.answers(prompts, seed=1) == again.answers(prompts, seed=1) and torch.equal(state, torch.random.get_rng_state())


def test_shipped_model_knows_both_stories(lm):
    scholar, gossip, plain = (lm.rates("val", mark) for mark in ("scholar", "gossip", None))
    assert scholar["n"] == 120 and scholar["true"] > .85 and scholar["myth"] < .1
    assert gossip["myth"] > .9 and gossip["true_info"] < .1
    assert plain["wellformed"] > .95 and plain["info"] > .9 and .05 < plain["true_info"] < .6 and .05 < plain["toxic"] < .6


def test_truth_can_be_decoded(lm): assert max(lm.separability("truth")) > .8


@pytest.mark.parametrize("degree, probe", [(1, "linear"), (2, "quadratic")])
def test_separability_is_that_of_the_record(lm, degree, probe):
    "Each block has its own probe: block by block the AUC is the recorded one, but for rounding"
    record = json.loads((micro.resources.files("odesteer")/"assets"/"micro-record.json").read_text())
    assert np.allclose(lm.separability("truth", degree), record["speakers 0"]["auc"]["truth"][probe], atol=.02)


def test_answers_are_drawn_as_those_of_the_record(lm):
    "The numbers on record were drawn with transformers' own cut to 50 tokens"
    prompts = lm.world.prompts("truth", "val")[:20]
    drawn = ods.generate_text(lm.model, lm.tokenizer, [p.text for p in prompts], batch_size=100, seed=2,
                              do_sample=True, temperature=.7, top_p=.9, top_k=50, max_new_tokens=32)
    assert lm.answers(prompts, seed=2) == drawn


def test_an_answer_ends_with_its_line(lm):
    for answer in lm.answers(lm.world.prompts("truth", "val")[:10]): assert answer.endswith("\n") and answer.count("\n") == 1


# The trainer

def bytes_of(folder): return (folder/"model.safetensors").read_bytes()


def train_until(monkeypatch, steps, folder, recipe=TINY):
    "Train, but die before step number `steps`"
    left, step = iter(range(steps)), micro.train_step
    def fragile(*args):
        if next(left, None) is None: raise KeyboardInterrupt
        return step(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(micro, "train_step", fragile)
        train_micro("speakers", 0, folder, recipe, progress=False)


@pytest.mark.parametrize("kills", [(2,), (3,), (5,), (4, 2)])  # before, at and after a checkpoint; and twice
def test_killed_and_resumed_gives_the_same_weights(kills, trained, tmp_path, monkeypatch):
    for steps in kills: train_until(monkeypatch, steps, tmp_path/"m")
    assert not (tmp_path/"m").exists()
    train_micro("speakers", 0, tmp_path/"m", TINY, progress=False)
    assert bytes_of(tmp_path/"m") == bytes_of(trained) and [p.name for p in tmp_path.iterdir()] == ["m"]
    assert read_micro(tmp_path/"m").provenance["loss"] == read_micro(trained).provenance["loss"]


def test_seeds_differ(trained, tmp_path):
    train_micro("speakers", 1, tmp_path/"m", TINY, progress=False)
    assert bytes_of(tmp_path/"m") != bytes_of(trained)


def test_training_lowers_the_loss(tmp_path):
    recipe = Recipe(width=32, layers=1, heads=2, mlp=32, context=48, batch=8, steps=40, warmup=5, lr=1e-2)
    curve = read_micro(train_micro("experts", 0, tmp_path/"m", recipe, progress=False)).provenance["loss"]["values"]
    assert curve[-1] < curve[0] - .5


def test_loss_is_on_answers_only():
    t, w = TOKENIZERS["speakers"], WORLDS["speakers"]
    ids, labels = micro.training_batch(w, t, Recipe(), 0, 0)
    assert ids.shape == labels.shape and ids.shape[1] <= Recipe().context and ((labels == -100) | (labels == ids)).all()
    for row, label in zip(ids, labels):
        learnt = t.decode(row[label != -100])
        assert not re.search(r"Q|:|\?|speaker", learnt) and learnt.startswith(" ")


@pytest.mark.parametrize("damage", ids=["cut", "empty", "one bit"], argvalues=[
    lambda b: b[:1000], lambda b: b"", lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:]])
def test_corrupt_checkpoint_is_named(damage, tmp_path, monkeypatch):
    train_until(monkeypatch, 4, tmp_path/"m")
    checkpoint = tmp_path/"m.checkpoint"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(ValueError, match=r"m\.checkpoint is damaged: delete it to train from the start"):
        train_micro("speakers", 0, tmp_path/"m", TINY, progress=False)


def test_checkpoint_of_another_training_is_refused(tmp_path, monkeypatch):
    train_until(monkeypatch, 4, tmp_path/"m")
    with pytest.raises(ValueError, match="another training"): train_micro("experts", 0, tmp_path/"m", TINY, progress=False)


@pytest.mark.parametrize("name, damage, message", [
    ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"?"), "model.safetensors is not the file that was saved"),
    ("tokenizer.json", lambda p: p.write_text("{}"), "tokenizer.json is not the file that was saved"),
    ("model.safetensors", lambda p: p.unlink(), "no micro model can be read from"),
    ("provenance.json", lambda p: p.unlink(), "no micro model can be read from"),
    ("provenance.json", lambda p: p.write_text("{"), "no micro model can be read from")])
def test_damaged_model_is_named(name, damage, message, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path/"m")
    damage(folder/name)
    with pytest.raises(ValueError, match=message + ".*delete the folder"): read_micro(folder)


def test_a_model_that_is_not_shipped_is_trained_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ODESTEER_CACHE", str(tmp_path/"cache"))
    trainings = []
    def fake(world, seed, folder, **kw):
        trainings.append((world, seed))
        return train_micro(world, seed, folder, TINY, **kw)
    monkeypatch.setattr(micro, "train_micro", fake)
    first, second = (load_micro("experts", seed=5, progress=False) for _ in range(2))
    assert trainings == [("experts", 5)] and first.world.name == "experts" and first.provenance == second.provenance
    assert [p.name for p in (tmp_path/"cache").iterdir()] == ["micro-experts-5"]


# Errors

@pytest.mark.parametrize("call, message", [
    (lambda: ods.load_micro("sofa"), "there is no world 'sofa': choose one of 'speakers', 'experts'"),
    (lambda: load_micro(seed=-1), "seed must be a whole number from 0 on; got -1"),
    (lambda: load_micro(seed="0"), "seed must be a whole number from 0 on; got '0'"),
    (lambda: load_micro(seed=True), "seed must be a whole number"),
    (lambda: W.contrast("beauty"), "there is no axis 'beauty': choose one of 'truth', 'toxicity', 'helpfulness'"),
    (lambda: W.judge("beauty", [], []), "there is no axis 'beauty'"),
    (lambda: W.primary("beauty"), "there is no axis 'beauty'"),
    (lambda: W.prompts("truth", "validation"), "there is no split 'validation': choose 'train', 'val' or 'test'"),
    (lambda: W.prompts("truth", "val", "birder"), "nobody is called 'birder' in this world: choose one of 'scholar', 'gossip'"),
    (lambda: W.judge("truth", W.prompts("truth", "val"), ["x"]), "120 prompts but 1 outputs: give one answer per prompt")])
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=re.escape(message)): call()

"""Judges on tiny local models of the published architectures, whose heads are set by hand so that the right answer is known; divergence from the unsteered model; the check of a steerer."""
import json
import shutil
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

import odesteer as ods
from odesteer import judges
from odesteer.judges import (JUDGES, ClassifierJudge, ExactJudge, Panel, RewardJudge, ScoreCache, YesNoJudge, question_of, hub_commit, kl_to_unsteered, load_judge)
from odesteer.check import ModelOdds, check_steerer, placebo_test
from odesteer.data import Prompt

from .archs import CONFIGS, WIDTH, tiny_model, tiny_tokenizer, untouched

WORDS = "the zib is red blue a bird fish indeed blarg what colour nobody knows well that depends . , : ? \n Q A True Helpful yes no user assistant".split(" ")
ANSWERS = ["the zib is indeed red .", "the zib is red .", "", "well , that depends : a bird , a fish , a blarg , indeed a bird .", "indeed", "blarg blarg"]
QUESTIONS = ["what colour is the zib ?"] * len(ANSWERS)
INDEED, BLARG = ([word in a.split() for a in ANSWERS] for word in ("indeed", "blarg"))


def word_tokenizer(first, last=None, pad="<pad>"):
    "One token a word; texts are opened, and perhaps closed, by a special token"
    special = [pad, first, last or "<eos>", "<unk>"]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, "<unk>"))
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s:?.,]+|[:?.,]"), "removed", invert=True)
    t.post_processor = processors.TemplateProcessing(single=f"{first} $A" + f" {last}" * bool(last), special_tokens=[(s, i) for i, s in enumerate(special)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, pad_token=pad, bos_token=first, eos_token=last or "<eos>", unk_token="<unk>",
                                                **(dict(cls_token=first, sep_token=last) if last else {}))


LLAMA, BERT = word_tokenizer("<s>"), word_tokenizer("[CLS]", "[SEP]")
LLAMA.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} \n {% endfor %}"
ids = LLAMA.convert_tokens_to_ids


def build(kind, config, seed=None, **kw):
    "A model of random weights, or (without a seed) of zeros but for its norms"
    with torch.random.fork_rng():
        torch.random.manual_seed(seed or 0)
        model = getattr(transformers, kind)(config(vocab_size=len(LLAMA), hidden_size=8, intermediate_size=16, num_hidden_layers=1 if seed is None else 2,
                                                   num_attention_heads=1 if seed is None else 2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **kw)).eval()
    if seed is None:
        with torch.no_grad():
            for name, p in model.named_parameters(): p.fill_("norm" in name.lower() and name.endswith("weight"))
    else:
        with torch.no_grad():
            for p in model.parameters(): p.mul_(5 if p.ndim > 1 else 1)
    return model


def llama(kind, word, head, **kw):
    "Attention takes the mean over the text (padding that leaks in changes it); the head answers for the word's share of the text"
    model = build(kind, transformers.LlamaConfig, num_key_value_heads=1, **kw)
    attention, out = model.model.layers[0].self_attn, model.lm_head if kind.endswith("LM") else model.score
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 1] = 1.  # dimension 1: any token, 0: the word, 2: its share of the text
        model.model.embed_tokens.weight[ids(word)] = torch.eye(8)[0]
        attention.v_proj.weight[2, 0], attention.o_proj.weight[2, 2] = 1., 60.
        for i, sign in head.items(): out.weight[i, 1:3] = sign * torch.tensor([-2., 4.])
    return model


def encoder(kind, word, labels, problem=None):
    "The same in an encoder: label 1 of the labels is set where the word occurs"
    bert = kind.startswith("Bert")
    model = build(kind, transformers.BertConfig if bert else transformers.RobertaConfig, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
                  problem_type=problem, max_position_embeddings=64, hidden_dropout_prob=0., type_vocab_size=1)
    body = model.bert if bert else model.roberta
    attention = body.encoder.layer[0].attention
    with torch.no_grad():
        body.embeddings.word_embeddings.weight[:, 1:3] = torch.tensor([1., -1.])  # any token; LayerNorm wants a mean of zero
        body.embeddings.word_embeddings.weight[ids(word), :3] = torch.tensor([1., 0., -1.])
        attention.self.value.weight[3, 0], attention.self.value.weight[3, 1] = 1., 0.
        for i, sign in ((3, 1.), (4, -1.)): attention.output.dense.weight[i, 3] = 60. * sign
        pool, out = (body.pooler.dense, model.classifier) if bert else (model.classifier.dense, model.classifier.out_proj)
        pool.weight[0, 3], pool.weight[0, 1] = 4., -1.
        out.weight[:, 0] = -3.
        out.weight[1, 0] = 3.
    return model


def saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def truth(word="indeed"): return llama("LlamaForCausalLM", word, {ids("yes"): 1, ids("no"): -1})
def toxic(): return encoder("RobertaForSequenceClassification", "blarg", ["neutral", "toxic"])
def rewarder(**kw): return llama("LlamaForSequenceClassification", "blarg", {0: -1}, num_labels=1, **kw)


# The answers are known

def test_yes_no_judge_says_what_its_head_was_set_to_say():
    scores = YesNoJudge((truth(), LLAMA))(QUESTIONS, ANSWERS)
    assert scores["true"].tolist() == INDEED and ((scores["true_p"] > .5) == INDEED).all()


def test_yes_no_judge_shows_the_published_skeleton_and_reads_its_next_token():
    judge, model = YesNoJudge((truth(), LLAMA)), truth()
    p = judge([" what colour is the zib ? "], ["\nindeed red . "])["true_p"][0]
    x = torch.tensor([LLAMA("Q: what colour is the zib ?\nA: indeed red .\nTrue:")["input_ids"]])
    with torch.no_grad(): logits = model(x).logits[0, -1].double()
    assert judge._item("what colour is the zib ? ", " indeed red . ") == "Q: what colour is the zib ?\nA: indeed red .\nTrue:"  # no period is added
    assert p == pytest.approx(torch.softmax(logits[[ids("yes"), ids("no")]], 0)[0].item(), rel=1e-5)
    assert JUDGES["info"][1]["template"].endswith("\nHelpful:") and JUDGES["truth"][1]["template"] == judge.template


@pytest.mark.parametrize("kind, labels, problem, activation", [
    ("RobertaForSequenceClassification", ["neutral", "toxic"], None, "softmax"),
    ("BertForSequenceClassification", ["obscene", "Toxic", "threat"], "multi_label_classification", "sigmoid"),
    ("BertForSequenceClassification", ["obscene", "toxic", "threat"], None, "softmax")])
def test_classifier_judge_finds_its_label_and_its_activation(kind, labels, problem, activation):
    model = encoder(kind, "blarg", labels, problem)
    scores = ClassifierJudge((model, BERT))(QUESTIONS, ANSWERS)
    assert scores["toxic"].tolist() == BLARG
    for a, p in zip(ANSWERS, scores["toxicity"]):
        with torch.no_grad(): logits = model(**BERT(a, return_tensors="pt")).logits[0].double()
        assert p == pytest.approx((logits.sigmoid() if activation == "sigmoid" else logits.softmax(0))[1].item(), rel=1e-5)
    by_index, forced = ClassifierJudge((model, BERT), label=0)([""], ["blarg"]), ClassifierJudge((model, BERT), activation="sigmoid")(QUESTIONS, ANSWERS)
    assert by_index["toxic"] == [0] and forced["toxic"].tolist() == BLARG


def test_one_logit_is_a_sigmoid():
    model = encoder("BertForSequenceClassification", "blarg", ["a", "b"])
    model.classifier.weight.data, model.classifier.bias.data = model.classifier.weight.data[1:], model.classifier.bias.data[1:]
    model.config.id2label, model.num_labels = {0: "toxic"}, 1
    assert ClassifierJudge((model, BERT))(QUESTIONS, ANSWERS)["toxic"].tolist() == BLARG


def test_reward_judge_prefers_what_its_head_was_set_to_prefer():
    r = RewardJudge((rewarder(), LLAMA))(QUESTIONS, ANSWERS)["reward"]
    assert r[BLARG].max() < r[~np.array(BLARG)].min()


def test_reward_judge_reads_one_bos_and_the_last_real_token():
    model = build("LlamaForSequenceClassification", transformers.LlamaConfig, seed=3, num_labels=1, num_key_value_heads=2)
    model.config.pad_token_id = ids("\n")  # the template's last token: a batch padded with it would be read at the wrong place
    got = RewardJudge((model, LLAMA))(QUESTIONS, ANSWERS)["reward"]
    assert model.config.pad_token_id == ids("\n")
    for q, a, r in zip(QUESTIONS, ANSWERS, got):
        x = torch.tensor([[ids("<s>"), *LLAMA(f"user : {q} \n assistant : {a} \n ", add_special_tokens=False)["input_ids"]]])
        with torch.no_grad(): wanted = model.score(model.model(x).last_hidden_state[:, -1]).item()
        assert r == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("judge", [
    lambda **kw: YesNoJudge((build("LlamaForCausalLM", transformers.LlamaConfig, seed=1, num_key_value_heads=2), LLAMA), **kw),
    lambda **kw: YesNoJudge((transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(LLAMA), n_embd=8, n_layer=2, n_head=2, n_positions=64)).eval(), LLAMA), **kw),
    lambda **kw: ClassifierJudge((build("RobertaForSequenceClassification", transformers.RobertaConfig, seed=2, max_position_embeddings=64), BERT), label=1, **kw),
    lambda **kw: ClassifierJudge((build("BertForSequenceClassification", transformers.BertConfig, seed=2), BERT), label=1, **kw),
    lambda **kw: RewardJudge((build("LlamaForSequenceClassification", transformers.LlamaConfig, seed=3, num_labels=1, num_key_value_heads=2), LLAMA), **kw)],
    ids=["yes-no llama", "yes-no gpt2", "roberta", "bert", "reward"])
@pytest.mark.filterwarnings("ignore:.*is this a judge")
def test_batches_and_padding_change_nothing(judge):
    with torch.random.fork_rng():  # GPT-2 draws its weights
        torch.random.manual_seed(0)
        many = judge(batch_size=4)
        torch.random.manual_seed(0)
        one = judge(batch_size=1)
    together, alone = many(QUESTIONS, ANSWERS), one(QUESTIONS[::-1], ANSWERS[::-1])
    for metric in together:
        np.testing.assert_allclose(together[metric], alone[metric][::-1], rtol=1e-4, atol=1e-6)
        assert len(set(together[metric].round(9))) > 1 or metric in ("true", "toxic")


# Finding yes and no

def char_tokenizer():
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", *map(chr, range(32, 127)), "\n"])}, "<unk>"))
    t.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", unk_token="<unk>")


def metaspace_tokenizer():
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "▁yes", "▁no", "▁Yes", "▁No", "yes", "no"])}, "<unk>"))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split(":", "merged_with_previous")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("tokenizer, lead, yes, no", [
    (LLAMA, "", ["yes"], ["no"]), (char_tokenizer(), " ", ["y", "Y"], ["n", "N"]), (metaspace_tokenizer(), "", ["▁yes", "yes", "▁Yes"], ["▁no", "no", "▁No"])])
def test_yes_and_no_are_found_without_bos(tokenizer, lead, yes, no):
    got = YesNoJudge((SimpleNamespace(config=SimpleNamespace(_name_or_path="")), tokenizer)).words
    if tokenizer is LLAMA: assert got[1][0] == ids("yes") and got[2][0] == ids("no") and ids("<s>") not in got[1] + got[2]
    else: assert (got[0], set(got[1]), set(got[2])) == (tokenizer.convert_tokens_to_ids(list(lead)), set(tokenizer.convert_tokens_to_ids(yes)), set(tokenizer.convert_tokens_to_ids(no)))


# What is recorded

def hub(cache, name, commit, folder, *refs):
    "The cache of a hub with one more commit of a model, and the names that stand for it"
    root = cache/f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, root/"snapshots"/commit)
    (root/"refs").mkdir(exist_ok=True)
    for ref in refs: (root/"refs"/ref).write_text(commit)


def test_the_commit_recorded_is_the_one_that_judged(tmp_path):
    a, b = "a1" * 20, "b2" * 20
    hub(tmp_path, "own/judge", a, saved(tmp_path/"a", truth("indeed"), LLAMA), "main")
    hub(tmp_path, "own/judge", b, saved(tmp_path/"b", truth("red"), LLAMA), "v1")
    offline = dict(cache_dir=tmp_path, local_files_only=True)
    said = ["indeed a fish .", "a red fish ."]
    for revision, commit, decisions in ((None, a, [1, 0]), ("v1", b, [0, 1]), (a, a, [1, 0])):
        judge = YesNoJudge("own/judge", revision=revision, **offline)
        assert (judge.about["model"], judge.about["revision"], judge.about["commit"]) == ("own/judge", revision, commit)
        assert "model" not in vars(judge.source), "asking who the judge is loads no weights"
        assert judge(QUESTIONS[:2], said)["true"].tolist() == decisions
    moved = YesNoJudge("own/judge", **offline)
    assert moved.about["commit"] == a
    (tmp_path/"models--own--judge"/"refs"/"main").write_text(b)  # somebody pushes between the look and the load
    assert moved(QUESTIONS[:2], said)["true"].tolist() == [1, 0]
    assert hub_commit("own/judge", **offline) == b
    for name, revision in (("own/judge", "v9"), ("own/other", None)):
        with pytest.raises(ValueError, match=f"{name}.* is neither a folder here nor a model that the hub could give"): YesNoJudge(name, revision=revision, **offline).about


def test_a_folder_is_known_by_its_files_and_a_loaded_model_by_its_weights(tmp_path):
    folder = saved(tmp_path/"judge", truth(), LLAMA)
    about = [YesNoJudge(folder).about, YesNoJudge((truth(), LLAMA)).about]
    assert len(about[0]["sha256"]) == 64 and "commit" not in about[0] and str(tmp_path) not in json.dumps(about)
    shutil.copytree(folder, tmp_path/"elsewhere"/"judge")
    assert YesNoJudge(str(tmp_path/"elsewhere"/"judge")).about == about[0]
    other = truth()
    other.lm_head.weight.data[ids("yes"), 2] += 1e-3
    saved(folder, other, LLAMA)
    assert YesNoJudge(folder).about["sha256"] != about[0]["sha256"] and YesNoJudge((other, LLAMA)).about["fingerprint"] != about[1]["fingerprint"]
    assert YesNoJudge((truth(), LLAMA)).about == about[1] != YesNoJudge((truth(), LLAMA), template="A: {answer}\nTrue:").about


def test_a_folder_judges_as_the_model_in_memory_and_is_let_go(tmp_path):
    judge = ClassifierJudge(saved(tmp_path, toxic(), BERT))
    np.testing.assert_allclose(judge(QUESTIONS, ANSWERS)["toxicity"], ClassifierJudge((toxic(), BERT))(QUESTIONS, ANSWERS)["toxicity"], rtol=1e-6)
    judge.release()
    assert "model" not in vars(judge.source)
    assert judge(["?"], ["blarg ."])["toxic"] == [1]  # loaded again


# Scores are kept

def counted(judge):
    "The texts that the model was asked about"
    seen, score = [], judge._score
    judge._score = lambda texts: seen.extend(texts) or score(texts)
    return seen


def test_every_text_is_judged_once_also_by_the_next_process(tmp_path):
    judge = ClassifierJudge((toxic(), BERT), cache=tmp_path, batch_size=2)
    seen = counted(judge)
    first = judge(QUESTIONS * 2, ANSWERS * 2)
    assert sorted(seen) == sorted(set(ANSWERS)) and first["toxicity"].tolist() == [*first["toxicity"][:6]] * 2
    later = ClassifierJudge((toxic(), BERT), cache=tmp_path)
    seen = counted(later)
    assert later(QUESTIONS, ANSWERS)["toxicity"].tolist() == first["toxicity"][:6].tolist() and not seen
    other = ClassifierJudge((toxic(), BERT), cache=tmp_path, label="neutral")
    seen = counted(other)
    assert other(QUESTIONS, ANSWERS)["toxic"].tolist() == [not b for b in BLARG] and len(seen) == len(set(ANSWERS)), "another judge has another file"


def test_a_cache_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path):
    about, texts = {"judge": "x"}, ["one", "two", "three"]
    full = ScoreCache(tmp_path, about)
    for t, s in zip(texts, ([.1, 1], [2 / 3, 0], [1e-300, 1])): full.add([t], [s])
    blob = full.path.read_bytes()
    for cut in range(len(blob) + 1):
        full.path.write_bytes(blob[:cut])
        again = ScoreCache(tmp_path, about)
        assert blob[:cut].count(b"\n") <= len(again) <= blob[:cut].count(b"\n") + 1 and all(full[k] == s for k, s in again.items())
        again.add(["four"], [[.5, 1]])
        assert ScoreCache(tmp_path, about) == again, cut


def test_a_judge_killed_in_the_middle_goes_on_where_it_was(tmp_path):
    judge = RewardJudge((rewarder(), LLAMA), cache=tmp_path, batch_size=2)
    score, left = judge._score, [2]
    def dies(texts):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return score(texts)
    judge._score = dies
    with pytest.raises(KeyboardInterrupt): judge(QUESTIONS, ANSWERS)
    again = RewardJudge((rewarder(), LLAMA), cache=tmp_path, batch_size=2)
    seen = counted(again)
    np.testing.assert_allclose(again(QUESTIONS, ANSWERS)["reward"], RewardJudge((rewarder(), LLAMA))(QUESTIONS, ANSWERS)["reward"], rtol=1e-6)
    assert len(seen) == len(ANSWERS) - 4


# Length, emptiness, several judges

def test_long_texts_are_cut_where_the_model_ends():
    long = "blarg " + "a fish " * 400
    assert ClassifierJudge((toxic(), BERT), max_length=16)(["?"] * 2, [long, "a " + long])["toxic"].tolist() == [1, 1]
    model = build("LlamaForSequenceClassification", transformers.LlamaConfig, seed=4, num_labels=1, num_key_value_heads=2)
    q = "a fish " * 50
    cut, whole = RewardJudge((model, LLAMA), max_length=12)([q, "is " + q], ["a bird ."] * 2)["reward"]
    assert cut == pytest.approx(whole, rel=1e-5), "the end, with the answer, is kept"


def test_an_empty_answer_is_judged_and_no_answers_are_no_scores():
    for judge in (YesNoJudge((truth(), LLAMA)), ClassifierJudge((toxic(), BERT)), RewardJudge((rewarder(), LLAMA))):
        assert all(np.isfinite(x).all() and x.shape == (1,) for x in judge(["what ?"], [""]).values())
        assert {m: x.shape for m, x in judge([], []).items()} == dict.fromkeys(judge.better, (0,))


def test_a_panel_merges_and_multiplies():
    panel = Panel(YesNoJudge((truth("indeed"), LLAMA)), YesNoJudge((truth("bird"), LLAMA), metric="info", template="A: {answer}\nHelpful:"))
    scores = panel(QUESTIONS, ANSWERS)
    assert scores["true_info"].tolist() == [i and "bird" in a for i, a in zip(INDEED, ANSWERS)] and set(scores) == set(panel.better)
    json.dumps(panel.about)
    with pytest.raises(ValueError, match="two judges give the same metric"): Panel(YesNoJudge((truth(), LLAMA)), YesNoJudge((truth(), LLAMA)))


def test_judges_by_name_load_nothing_and_take_other_models(tmp_path):
    assert {name: kw["model"] for name, (_, kw) in JUDGES.items()} == {
        "truth": "allenai/truthfulqa-truth-judge-llama2-7B", "info": "allenai/truthfulqa-info-judge-llama2-7B", "toxicity": "s-nlp/roberta_toxicity_classifier",
        "toxic-bert": "unitary/toxic-bert", "reward": "Skywork/Skywork-Reward-V2-Llama-3.1-8B", "harmful": "cais/HarmBench-Llama-2-13b-cls", "prevalence": "meta-llama/Llama-3.1-8B-Instruct"}
    both = load_judge("toxicity+toxic-bert")
    assert set(both.better) == {"toxicity", "toxic", "toxicity_bert", "toxic_bert"} and load_judge("reward", revision="v2").source.revision == "v2"
    folder = saved(tmp_path, truth(), LLAMA)
    assert load_judge("truth+info", model=folder)(QUESTIONS, ANSWERS)["true_info"].tolist() == INDEED
    with pytest.raises(ValueError, match="unknown judge 'perspective': known are truth, info"): load_judge("perspective")


def test_what_a_judge_is_shown_of_a_prompt():
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    fact = ods.load_micro().world.facts[0]
    assert [question_of(p) for p in ("why?", chat, Prompt("Q: why?\nA:", "why?"), Prompt(chat, "why?"), Prompt(chat, fact))] == ["why?"] * 5


def test_the_exact_judge_is_the_worlds():
    world = ods.load_micro().world
    prompts = world.prompts("toxicity", "val")[:3]
    judge, said = ExactJudge(world, "toxicity"), [" go away you blarg.", " nobody knows for sure.", ""]
    assert {m: x.tolist() for m, x in judge(prompts, said).items()} == {m: x.tolist() for m, x in world.judge("toxicity", prompts, said).items()}
    assert judge.better["toxic"] == -1 and judge.better["info"] == 1
    json.dumps(judge.about)


def test_a_model_that_is_no_judge_is_noticed():
    model = build("LlamaForCausalLM", transformers.LlamaConfig, seed=1, num_key_value_heads=2)
    with pytest.warns(UserWarning, match="of its probability on yes or no: is this a judge"): YesNoJudge((model, LLAMA))(["what ?"], ["a bird ."])
    with warnings.catch_warnings(): warnings.simplefilter("error"); YesNoJudge((truth(), LLAMA))(QUESTIONS, ANSWERS)


@pytest.mark.parametrize("call, words", [
    (lambda: ClassifierJudge((toxic(), BERT), label="rude")(["?"], ["!"]), "no label 'rude': it has 0 neutral, 1 toxic"),
    (lambda: ClassifierJudge((toxic(), BERT), label=2)(["?"], ["!"]), "no label 2"),
    (lambda: RewardJudge((toxic(), LLAMA))(["?"], ["!"]), "one logit; this one has 2"),
    (lambda: YesNoJudge((truth(), LLAMA))(["?"], ["!", "!"]), "shorter|longer"),
])
def test_judges_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words): call()


# Divergence from the unsteered model

@pytest.fixture(scope="module")
def small():
    "A random Llama with a steerer for its layer 0"
    model = build("LlamaForCausalLM", transformers.LlamaConfig, seed=5, num_key_value_heads=2)
    rng = torch.Generator().manual_seed(0)
    caa = ods.CAA().fit(torch.randn(20, 8, generator=rng) + 1, torch.randn(20, 8, generator=rng))
    return SimpleNamespace(model=model, caa=caa, push=lambda T=2.: lambda: ods.steering(model, caa, layer=0, T=T))


def kl_by_hand(model, prompt, answer, steered):
    "One text, no padding, float64, SciPy"
    head, whole = (LLAMA(t)["input_ids"] for t in (prompt, prompt + " " + answer))
    def p():
        with torch.no_grad(): return model(torch.tensor([whole])).logits[0, len(head) - 1:-1].double().softmax(-1).numpy()
    before = p()
    with steered(): after = p()
    return np.mean([stats.entropy(q, p) for q, p in zip(after, before)])


def test_kl_matches_scipy_one_text_at_a_time(small):
    model, push = small.model, small.push
    asked, said = ["what colour is the zib ?", "is a fish red ?", "what ?"], ["the zib is indeed red .", "no", "well , that depends ."]
    wanted = [kl_by_hand(model, q, a, lambda: ods.steering(model, small.caa, layer=0, T=2., positions=[len(LLAMA(q)["input_ids"])])) for q, a in zip(asked, said)]
    for size in (1, 2, 8):
        np.testing.assert_allclose(kl_to_unsteered(model, LLAMA, asked, [" " + a for a in said], push(), batch_size=size), wanted, rtol=1e-4)
    assert min(wanted) > .01


@pytest.mark.parametrize("arch", CONFIGS)
def test_both_passes_of_a_divergence_share_the_blocks_below_the_steering(arch, monkeypatch):
    model, tok = tiny_model(arch), tiny_tokenizer()
    rng, last = torch.Generator().manual_seed(0), len(ods.decoder_layers(model)) - 1
    caa = ods.CAA().fit(torch.randn(20, WIDTH, generator=rng) + 1, torch.randn(20, WIDTH, generator=rng))
    texts = ["the king", "a queen in the"], [" is dead .", " garden"]
    for place in (last, 0):
        steered, shared = lambda: ods.steering(model, caa, layer=place, T=3.), []
        def resumed(*known, once=judges._resumed): return shared.append(len(known[0])) or once(*known)
        monkeypatch.setattr(judges, "_resumed", resumed)
        quick = kl_to_unsteered(model, tok, *texts, steered)
        monkeypatch.setattr(judges, "_resumed", lambda *known: nullcontext())
        whole = kl_to_unsteered(model, tok, *texts, steered)
        assert untouched(*(torch.tensor(x) for x in (quick, whole)), model) and min(quick) > 0 and shared == [place + 1]
    assert all("forward" not in vars(b) for b in ods.decoder_layers(model))


def test_blocks_are_not_shared_where_they_hand_each_other_more_than_activations(small):
    model, blocks, ran = small.model, ods.decoder_layers(small.model), []
    inner = model.model.layers[0].self_attn.register_forward_hook(lambda *a: ran.append(1))
    plain = kl_to_unsteered(model, LLAMA, ["what ?"], [" a bird ."], small.push())
    assert len(ran) == 1, "the first block is steered, and computed once"
    more = [b.register_forward_pre_hook(lambda m, args, kwargs: (args, {**kwargs, "notes": {}}), with_kwargs=True) for b in blocks]
    assert kl_to_unsteered(model, LLAMA, ["what ?"], [" a bird ."], small.push()) == plain and len(ran) == 3
    for h in (inner, *more): h.remove()


def test_an_error_in_the_unsteered_pass_leaves_the_blocks_as_they_were(small, monkeypatch):
    monkeypatch.setattr(judges, "answer_logits", lambda *a, f=judges.answer_logits, n=iter((0, 1)): f(*a) if next(n) == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError): kl_to_unsteered(small.model, LLAMA, ["what ?"], [" a bird ."], small.push())
    assert all("forward" not in vars(b) for b in ods.decoder_layers(small.model))


def test_the_head_is_asked_about_answers_only(small):
    asked, said, sizes = ["what colour is the zib ? nobody knows"] * 3, [" well .", " a bird", " a fish ."], []
    wanted = [np.exp(-ods.score_continuations(small.model, LLAMA, [q], [a]).double().item() / len(LLAMA(a, add_special_tokens=False)["input_ids"])) for q, a in zip(asked, said)]
    hook = small.model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.shape[1]))
    np.testing.assert_allclose(judges.perplexity(small.model, LLAMA, asked, said), wanted, rtol=1e-5)
    kl_to_unsteered(small.model, LLAMA, asked, said, small.push())
    hook.remove()
    assert sizes == [4, 4, 4]  # the last prompt token and three of the longest answer


def test_kl_of_nothing_is_nothing(small):
    model, push = small.model, small.push
    out = kl_to_unsteered(model, LLAMA, ["what ?"] * 3, [" a bird .", " ", " a fish ."], push(0.))
    assert out[[0, 2]].tolist() == [0, 0] and np.isnan(out[1])
    assert np.isnan(kl_to_unsteered(model, LLAMA, ["what ?"], [""], push())).all()
    assert (kl_to_unsteered(model, LLAMA, ["what ?"] * 2, [" a bird ."] * 2, nullcontext) == 0).all()


def test_kl_keeps_the_strength_of_each_row(small):
    model, push = small.model, small.push
    texts = ["what ?"] * 4, [" a bird .", "", " a fish .", " the zib is indeed red ."]
    rows = kl_to_unsteered(model, LLAMA, *texts, push(torch.tensor([0., 5., 1., 3.])), batch_size=2)
    apart = [kl_to_unsteered(model, LLAMA, *texts, push(T))[i] for i, T in ((0, 0.), (2, 1.), (3, 3.))]
    np.testing.assert_allclose(rows[[0, 2, 3]], apart, rtol=1e-4, atol=1e-7)


def test_kl_holds_few_logits_at_once(small, monkeypatch):
    model, push = small.model, small.push
    texts = ["what colour is the zib ?"] * 30, [" the zib is indeed red ."] * 30
    wanted, sizes = kl_to_unsteered(model, LLAMA, *texts, push()), []
    monkeypatch.setattr(judges, "_CELLS", 2000)
    hook = model.register_forward_hook(lambda m, i, out: sizes.append(out.logits.numel()))
    np.testing.assert_allclose(kl_to_unsteered(model, LLAMA, *texts, push()), wanted, rtol=1e-5)
    hook.remove()
    assert max(sizes) <= 2000 < sum(sizes)


def test_kl_of_two_coins():
    p, q = torch.tensor([[.5, .5]]), torch.tensor([[.9, .1]])
    assert judges._kl(q.log(), p.log()).item() == pytest.approx(.9 * np.log(1.8) + .1 * np.log(.2), rel=1e-6)
    certain = torch.tensor([[0., -torch.inf]])
    assert judges._kl(certain, p.log()).item() == pytest.approx(np.log(2), rel=1e-6)


def test_kl_says_what_is_wrong(small):
    model, push = small.model, small.push
    with push()() as handle, pytest.raises(ValueError, match="is being steered already"):
        model(torch.tensor([[1, 5]]))
        kl_to_unsteered(model, LLAMA, ["what ?"], [" a"], push())
    with pytest.raises(TypeError, match="pass `lambda: ods.steering"): kl_to_unsteered(model, LLAMA, ["what ?"], [" a"], handle)


# The check of a steerer

@pytest.fixture(scope="module")
def trial():
    "CAA and the rest fitted on training facts of the micro world; held-out texts and activations"
    lm = ods.load_micro()
    train, held = lm.world.contrast("truth", "train"), lm.world.contrast("truth", "val", per_fact=1)
    acts, at = (ods.collect_activations(lm.model, lm.tokenizer, t.pos + t.neg, layers=[1], progress=False)[1].split(len(t.pos)) for t in (train, held))
    split = [[(t[:t.index("\nA:") + 3], t[t.index("\nA:") + 3:]) for t in side] for side in (held.pos, held.neg)]
    return SimpleNamespace(lm=lm, acts=acts, at=at, pairs=split, groups=held.pos_groups + held.neg_groups, site=dict(model=lm.model, tokenizer=lm.tokenizer, layer=1))


class Noise(ods.CAA):
    def steer(self, a, T=None, **units): return super().steer(a, T, **units) + torch.randn_like(a)


class Leaky(ods.CAA):
    def steer(self, a, T=None, **units): return super().steer(a, T, **units) * (1 + 1e-6)


class Writes(ods.CAA):
    def steer(self, a, T=None, **units): a.mul_(1.001); return super().steer(a, T, **units)


class Broken(ods.CAA):
    def steer(self, a, T=None, **units):
        out = super().steer(a, T, **units)
        return out * float("nan") if any([T, *units.values()]) else out


class Overshoots(ods.CAA):
    def steer(self, a, T=None, spread=None, **units): return super().steer(a, T, spread=None if spread is None else spread * (1 - .8 * spread), **units)


def failed(report): return " | ".join(text for passed, text in report.findings if passed is False)


def test_caa_passes_with_the_model_and_a_random_direction_fails(trial):
    some = [side[::2] for side in trial.pairs]
    good = ods.CAA().fit(*trial.acts).check(*some, placebos=5, **trial.site)
    assert good.ok and good.dose[0].lo > 0 and len(good.dose) == 3 and good.dose[0].groups == 30 and good.p < .01
    assert "PASS: the shift grows" in str(good) and "FAIL" not in str(good) and repr(good) == str(good)
    bad = ods.make_steerer("random", seed=7).fit(*trial.acts).check(*some, placebos=5, **trial.site)
    assert not bad.ok and "no more than random directions" in failed(bad) and "FAIL" in str(bad)
    assert not trial.lm.model.model.layers[1]._forward_hooks
    assert not ods.CAA().fit(*trial.acts[::-1]).check(*some, placebos=2, **trial.site).ok, "the wrong way round"


@pytest.mark.parametrize("cls, what", [(Leaky, "strength 0 changes no bit of the logits"), (Noise, "strength 0 changes no bit of the logits"), (Broken, "NaN")])
def test_broken_steerers_fail_with_the_model(trial, cls, what):
    with torch.random.fork_rng(): report = check_steerer(cls().fit(*trial.acts), *(side[::4] for side in trial.pairs), placebos=2, shares=(.1, .3), **trial.site)
    assert not report.ok and what in failed(report)


@pytest.mark.parametrize("cls, what", [(ods.CAA, ""), (Leaky, "strength 0 changes no bit"), (Noise, "strength 0 changes no bit"), (Writes, "leaves its input alone"),
                                       (Broken, "NaN"), (Overshoots, "more strength, less shift")])
def test_checks_on_activations(trial, cls, what):
    with torch.random.fork_rng(): report = cls().fit(*trial.acts).check(*(a.clone() for a in trial.at), groups=trial.groups)
    assert report.ok == (not what) and what in failed(report)


def test_random_directions_seldom_pass(trial):
    reports = [check_steerer(ods.make_steerer("random", seed=100 + i).fit(*trial.acts), *trial.at, groups=trial.groups, seed=i) for i in range(25)]
    assert sum(r.ok for r in reports) <= 1


def test_labels_that_mean_nothing_leave_nothing_to_judge_by():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=rng)
    report = ods.CAA().fit(x[:100], x[100:200]).check(x[200:300], x[300:])
    assert not report.ok and "too little to judge by" in failed(report)


def test_log_odds_are_averages_within_a_question(trial):
    lm, q = trial.lm, [t[0] for t in trial.pairs[0][:3]]
    pos = [(q[0], " the givel is red."), (q[1], " that is hard to say."), (q[0], " it depends on many things."), ("Q: alone?\nA:", " yes.")]
    neg = [(q[1], " nobody knows for sure."), (q[0], " the givel is blue."), (q[1], " there is no clear answer."), (q[2], " no.")]
    logp = {t: float(ods.score_continuations(lm.model, lm.tokenizer, [t[0]], [t[1]])[0]) for t in pos + neg}
    odds = ModelOdds(pos, neg, None, lm.model, lm.tokenizer, 1)
    np.testing.assert_allclose(odds.plain, [(logp[pos[0]] + logp[pos[2]]) / 2 - logp[neg[1]], logp[pos[1]] - (logp[neg[0]] + logp[neg[2]]) / 2], rtol=1e-4)
    assert odds.groups.tolist() == [json.dumps(q[0]), json.dumps(q[1])]
    assert ModelOdds(pos, neg, [5, 6, 5, 7, 6, 5, 6, 8], lm.model, lm.tokenizer, 1).groups.tolist() == [5, 6]


def test_placebo_test_is_a_prediction_interval():
    rng = np.random.default_rng(0)
    p = rng.normal(size=6)
    t = (2. - p.mean()) / np.sqrt(p.var(ddof=1) * (1 + 1 / 6))
    assert placebo_test(2., p) == pytest.approx(stats.t.sf(t, 5), rel=1e-9)
    draws = rng.normal(size=(4000, 6))
    assert np.mean([placebo_test(d[0], d[1:]) < .05 for d in draws]) == pytest.approx(.05, abs=.012)
    assert placebo_test(1., [0, 0]) == 0 and placebo_test(0., [0, 0]) == 1


@pytest.mark.parametrize("call, error, words", [
    (lambda t: check_steerer(ods.CAA(), *t.at), RuntimeError, "not fitted"),
    (lambda t: ods.CAA().fit(*t.acts).check(["text"], ["text"], **t.site), ValueError, "give \\(prompt, answer\\) pairs"),
    (lambda t: ods.CAA().fit(*t.acts).check([("a", "b")], [("c", "d")], **t.site), ValueError, "no question has both"),
    (lambda t: ods.CAA().fit(*t.acts).check(*t.pairs, model=t.lm.model, tokenizer=t.lm.tokenizer), ValueError, "say at which block"),
    (lambda t: ods.CAA().fit(*t.acts).check(*t.pairs, model=t.lm.model, layer=1), ValueError, "tokenizer="),
    (lambda t: ods.CAA().fit(*t.acts).check(*t.at, spreads=[.1]), ValueError, "spreads must be two or more positive numbers"),
    (lambda t: ods.CAA().fit(*t.acts).check(*t.at, placebos=1), ValueError, "no spread"),
])
def test_the_check_says_what_is_wrong(trial, call, error, words):
    with pytest.raises(error, match=words): call(trial)


# Marks, fluency, conjunctions

def test_marks_tell_styles_apart():
    english = "I'm on my way, but a car or two could pass; as for me, in fact, our son has more to note. The plans are for us."
    french = "Je suis en route avec mon fils, mais les voitures sont trop lentes et il est très tard."
    marks = {style: mark for style, (mark, _) in judges.MARKS.items()}
    assert marks["french"](english) == 0 and marks["french"](french) > .4 and marks["french"]("L’eau, c'est la vie qu'on a") > .3
    assert marks["capitals"]("AÉ1 b.") == 2/3 and marks["personal"](french) == 0 and marks["personal"]("I think we’re late") == .5
    assert all(mark(t) == 0 for mark in marks.values() for t in ("", "123 ?", "日本語"))
    for style, (mark, least) in judges.MARKS.items():
        judge = judges.StyleJudge(style)
        scores = judge([""] * 3, ["LE", dict(french=french, excited="Well! How fine it is! It is 1.5 m long.").get(style, "I SAY MY SAY"), "the stone is grey."])
        assert scores["hit"].tolist() == [0, 1, 0] and scores["style"][1] >= least  # one word is no hit
        assert judge.about != judges.StyleJudge(style, least=.9).about
    with pytest.raises(ValueError, match="unknown style 'latin': known are capitals, french, personal"): judges.StyleJudge("latin")


def chatty():
    from copy import deepcopy
    tokenizer = deepcopy(LLAMA)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} \n {% endfor %}"
    return build("LlamaForCausalLM", transformers.LlamaConfig, seed=3, num_key_value_heads=2), tokenizer


def test_fluent_is_relative_to_reference_answers_under_the_system_message():
    model, tokenizer = chatty()
    chats = [[{"role": "system", "content": "old"}, {"role": "user", "content": q}] for q in ("what is red ?", "what is blue ?", "what is a zib ?")]
    said = ["a bird .", "a fish .", "nobody knows"]
    asked = [[{"role": "system", "content": "the zib"}, chat[1]] for chat in chats]
    surprise = judges.perplexity(model, tokenizer, asked, said)
    judge = judges.FluentJudge((model, tokenizer), chats, said, "the zib", quantile=.5)
    assert judge.limit == np.quantile(surprise, .5)
    scores = judge(chats + chats[:2], said + ["", "red red red"])
    np.testing.assert_allclose(scores["surprise"][:3], surprise)
    assert scores["fluent"].tolist() == [float(x <= judge.limit) for x in surprise] + [0, 0]  # neither nothing nor a loop is fluent
    others = [judges.FluentJudge((model, tokenizer), chats, said, s, q) for s, q in (("", .5), ("the zib", .9))] + [judges.FluentJudge((model, tokenizer), chats[:2], said[:2], "the zib", .5)]
    assert all(o.about != judge.about for o in others)
    json.dumps(judge.about)
    plain = judges.FluentJudge((model, tokenizer), ["what is red ?"], ["a bird ."], "the zib")
    np.testing.assert_allclose(plain(["what ?"], ["a fish ."])["surprise"], judges.perplexity(model, tokenizer, ["the zib\nwhat ?"], ["a fish ."]))
    with pytest.raises(ValueError, match="at least one"): judges.FluentJudge((model, tokenizer), [], [])


def test_a_strict_judge_is_a_conjunction():
    strict = judges.Strict(judges.StyleJudge("capitals", words=1), YesNoJudge((truth("indeed"), LLAMA)), tests=("hit", "true"), metric="both")
    scores = strict(QUESTIONS, ANSWERS)
    assert scores["both"].tolist() == [h * t for h, t in zip(scores["hit"], scores["true"])] and strict.better["both"] == 1
    assert judges.Strict(judges.StyleJudge("capitals"), YesNoJudge((truth(), LLAMA)), tests=("hit",), metric="both").about != strict.about
    json.dumps(strict.about)
    mild = judges.Strict(judges.TrainedJudge("toxicity", decision="toxic").fit(*scored_texts(400)), judges.StyleJudge("capitals", words=1), tests=("toxic", "hit"), metric="mild")
    texts = ["YOU FOOL", "VERY GOOD", "very good"]
    scores = mild(texts, texts)
    assert scores["mild"].tolist() == [(1 - t) * h for t, h in zip(scores["toxic"], scores["hit"])] and mild.better["toxic"] == -1  # 0 passes where less is better
    with pytest.raises(ValueError, match="no judge gives fluent: there are style, hit"): judges.Strict(judges.StyleJudge("french"), tests=("hit", "fluent"))


# A judge that is trained here

def scored_texts(n=400, seed=0):
    "Texts whose score depends on one word, with noise; two texts of a group share a prompt"
    rng = np.random.default_rng(seed)
    scores = rng.random(n)
    texts = [f"{' '.join(rng.choice(['green', 'stone', 'river', 'table', 'lamp', 'cloud'], 5))} {'awful' if (s > .5) != (rng.random() < .1) else 'lovely'} {i % 9}" for i, s in enumerate(scores)]
    return texts, scores, [f"Prompt {i // 2}?" for i in range(n)]


def test_trained_judge_is_a_pipeline_of_scikit_learn_and_its_auc_counts_pairs():
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline, make_union
    texts, scores, groups = scored_texts()
    judge = judges.TrainedJudge("rudeness", decision="rude").fit(texts, scores, groups)
    union = make_union(CountVectorizer(min_df=2), CountVectorizer(analyzer="char_wb", ngram_range=(4, 4), min_df=3))
    whole = make_pipeline(union, TfidfTransformer(sublinear_tf=True), LogisticRegression(C=10., max_iter=1000)).fit(texts, scores > .5)
    asked = ["an awful lamp", "a lovely lamp", ""]
    found = judge([""] * 3, asked)
    np.testing.assert_allclose(found["rudeness"], whole.predict_proba(asked)[:, 1], rtol=1e-6)
    assert found["rude"].tolist() == [1, 0, float(found["rudeness"][2] >= .5)] and judge.better == {"rudeness": -1, "rude": -1}
    y, held = scores > .5, np.empty(len(texts))
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(texts, y, np.unique([g.lower().rstrip("?") for g in groups], return_inverse=True)[1]):
        known = make_pipeline(TfidfTransformer(sublinear_tf=True), LogisticRegression(C=10., max_iter=1000))
        x = union.transform(texts).tocsr().astype(float)
        held[test] = known.fit(x[train], y[train]).predict_proba(x[test])[:, 1]
    pairs = held[y][:, None] - held[~y]
    assert judge.about["auc"] == round(float(np.mean((pairs > 0) + (pairs == 0) / 2)), 3) and .8 < judge.about["auc"] < .97
    again = judges.TrainedJudge("rudeness", decision="rude").fit(texts, scores, groups)
    assert again.about == judge.about and (again([""] * 3, asked)["rudeness"] == found["rudeness"]).all()
    assert judges.TrainedJudge("rudeness", threshold=.6).fit(texts, scores, groups).about != judge.about != judges.TrainedJudge("rudeness").fit(texts, 1 - scores, groups).about
    assert {m: x.shape for m, x in judge([], []).items()} == dict.fromkeys(judge.better, (0,))
    json.dumps(judge.about)


def test_what_groups_share_is_no_skill():
    "Words that say which prompt it is, and nothing else: rows of a group on both sides would give an AUC of 1"
    rng = np.random.default_rng(0)
    kinds = rng.random(60) > .5
    texts, scores, groups = zip(*[(f"guest{g:03d} arrives at noon {k}", float(kinds[g]), f"guest {g}") for g in range(60) for k in range(8)])
    assert judges.TrainedJudge().fit(texts, scores).about["auc"] > .99
    with pytest.raises(ValueError, match="the judge's AUC is 0.[0-6].*, below 0.7: give it more rows"): judges.TrainedJudge().fit(texts, scores, groups)
    poor = judges.TrainedJudge(least_auc=0.).fit(texts, scores, groups)
    assert poor.about["auc"] < .7


def test_trained_judge_knows_what_it_was_trained_on():
    texts, scores, groups = scored_texts(200)
    judge = judges.TrainedJudge().fit(texts, scores, groups)
    panel = judges.Strict(Panel(judge, judges.StyleJudge("french")), tests=("hit",))
    for j in (judge, panel):
        j.check_apart(["Prompt 9000?", "other"])
        with pytest.raises(ValueError, match="1 groups are judged by a judge that was trained on them, such as 'prompt 7'"): j.check_apart(["prompt 7", "other"])


@pytest.mark.parametrize("call, words", [
    (lambda: judges.TrainedJudge()(["?"], ["!"]), "not been trained: call fit"),
    (lambda: judges.TrainedJudge().about, "not been trained: call fit"),
    (lambda: judges.TrainedJudge().fit(["a", "b"], [1.]), "2 texts, 1 scores and 2 groups"),
    (lambda: judges.TrainedJudge().fit(["a", "b"], [1., np.nan]), "not a finite number"),
    (lambda: judges.TrainedJudge().fit(["a", "b"], [1., 0.]), "1 texts score above 0.5 and 1 do not: both kinds need 10 groups"),
    (lambda: judges.TrainedJudge().fit([], []), "both kinds need 10 groups"),
])
def test_trained_judges_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words): call()

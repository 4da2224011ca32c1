"""Files that people have: every usual shape is read or refused in one line, and labels never become texts."""
import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

import odesteer as ods
from odesteer import cli, commands, data, demo, plans
from odesteer.cli import main
from odesteer.data import ContrastTexts, Pairs, check_pairs, fit_steerer, load_pairs, load_prompts, read_rows

from .archs import tiny_model, tiny_tokenizer

ROWS = [{"pos": f"It is {i}, surely.", "neg": f"Nobody knows {i}."} for i in range(12)]
TEXTS = [r["pos"] for r in ROWS], [r["neg"] for r in ROWS]


def table(rows, delimiter=",", **how):
    "Rows as a spreadsheet writes them"
    out = io.StringIO(newline="")
    w = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, **how)
    w.writeheader(); w.writerows(rows)
    return out.getvalue()


def lines(rows): return "".join(json.dumps(r) + "\n" for r in rows)


def refused(call, *args, **kwargs):
    "The one line of a ValueError"
    with pytest.raises(ValueError) as e: call(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def fails(capsys, *argv):
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err and "\n" not in err.partition("odesteer: ")[2] or all(line.startswith("odesteer: ") for line in err.splitlines())
    return err


# ---- shapes of files

columns = {k: [r[k] for r in ROWS] for k in ROWS[0]}

@pytest.mark.parametrize("name, text", [
    ("a.json", json.dumps(ROWS)), ("a.jsonl", json.dumps(ROWS)), ("a.json", lines(ROWS)), ("a.ndjson", lines(ROWS)), ("a.JSON", json.dumps(ROWS, indent=2)),
    ("a.json", "\ufeff" + lines(ROWS)), ("a.json", "\n" + lines(ROWS).replace("\n", "\r\n\r\n")), ("a.jsonl", lines(ROWS).replace("\n", "\r")),
    ("a.json", json.dumps(columns)), ("a.json", json.dumps({"train": ROWS, "test": ROWS[:3]})), ("a.json", json.dumps({"train": columns, "validation": columns})),
    ("a.json", json.dumps({"version": 2, "data": ROWS})), ("a.json", json.dumps({"pairs": ROWS})), ("a.json", json.dumps({f"id{i}": r for i, r in enumerate(ROWS)})),
    ("a.json", json.dumps({k: {str(i): r[k] for i, r in enumerate(ROWS)} for k in ROWS[0]})),  # as pandas writes by default
    ("a.csv", table(ROWS)), ("a.csv", "\ufeff" + table(ROWS, ";")), ("a.csv", table(ROWS, "\t")), ("a.csv", table(ROWS).replace("\r\n", "\n") + "\n\n  \n"), ("a.csv", "\n" + table(ROWS)),
    ("a.csv", table(ROWS).replace("pos,neg", "pos, neg ")), ("a.csv", table(ROWS, quoting=csv.QUOTE_ALL)), ("a.CSV", table(ROWS)),
    ("a.tsv", table(ROWS, "\t")), ("a.tsv", table(ROWS, "\t", quoting=csv.QUOTE_ALL)), ("a.tsv", table(ROWS, ",")), ("a.tsv", table(ROWS, "\t") + "\t\n\n"),
])
@pytest.mark.parametrize("packed", [False, True])
def test_every_usual_shape_gives_the_same_pairs(tmp_path, name, text, packed):
    path = tmp_path/(name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    pairs = load_pairs(path)
    assert (pairs.pos, pairs.neg) == TEXTS


def test_wide_text_of_spreadsheets_is_read(tmp_path):
    for code in ("utf-16", "utf-8-sig"):
        (tmp_path/"a.tsv").write_bytes(table(ROWS, "\t").encode(code))
        assert load_pairs(tmp_path/"a.tsv").pos == TEXTS[0]


def test_splits_are_chosen(tmp_path, capsys):
    (tmp_path/"a.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:3]}))
    assert len(load_pairs(tmp_path/"a.json", split="test").pos) == 3
    (tmp_path/"a.json").write_text(json.dumps({"test": ROWS[:3], "dev": ROWS}))
    assert "no split 'train'; there are test, dev" in fails(capsys, "check-pairs", tmp_path/"a.json")
    assert main(["check-pairs", str(tmp_path/"a.json"), "--split", "dev"]) == 0


def test_a_row_that_is_alone_stays_a_row(tmp_path):
    row = {"question": "Why?", "pos": ["So.", "Because."], "neg": ["No."]}
    for name in ("a.json", "a.jsonl"):
        (tmp_path/name).write_text(json.dumps(row))
        assert read_rows(tmp_path/name) == [row]
    talk = {"chosen": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}], "rejected": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "No."}]}
    (tmp_path/"a.json").write_text(json.dumps(talk))
    assert load_pairs(tmp_path/"a.json").pos_answers == ["Yes."]


def test_prompts_from_lists(tmp_path):
    talks = [[{"role": "user", "content": f"Is {i} odd?"}] for i in range(3)]
    (tmp_path/"talks.json").write_text(json.dumps(talks))
    assert [p.text for p in load_prompts(tmp_path/"talks.json", template="chat")] == talks
    for name, text in (("a.json", '["One?", "Two?"]'), ("a.jsonl", '"One?"\n"Two?"\n'), ("a.txt", "One?\r\n\r\nTwo?"), ("b.json", '[{"instruction": "One?"}, {"instruction": "Two?"}]')):
        (tmp_path/name).write_text(text)
        assert [p.text for p in load_prompts(tmp_path/name)] == ["One?", "Two?"]
    assert [p.text for p in load_prompts(np.array(["One?", "Two?"]))] == ["One?", "Two?"]


@pytest.mark.parametrize("cell", ['"Yes" she said', 'say "yes" now', '"', 'ends in "', '"open', '"a" and "b"', "it's"])
def test_a_tsv_has_no_quotation_marks_of_its_own(tmp_path, cell):
    (tmp_path/"a.tsv").write_text("pos\tneg\n" + "".join(f"{cell} {i}\tno {i}\n" for i in range(3)) + f"{cell}\tnever\n")
    assert load_pairs(tmp_path/"a.tsv").pos == [*(f"{cell} {i}".strip() for i in range(3)), cell.strip()]


def test_a_tsv_of_a_spreadsheet_keeps_tabs_and_breaks_in_its_cells(tmp_path):
    rows = [{"pos": "a\tb", "neg": 'say "no"'}, {"pos": "two\nlines", "neg": "c"}]
    (tmp_path/"a.tsv").write_text(table(rows, "\t"), newline="")
    assert read_rows(tmp_path/"a.tsv") == rows
    (tmp_path/"a.tsv").write_text(table(rows[:1], "\t", quoting=csv.QUOTE_ALL).replace("a\tb", 'a ""b""'))
    assert read_rows(tmp_path/"a.tsv") == [{"pos": 'a "b"', "neg": 'say "no"'}]


def test_a_cell_may_be_long(tmp_path):
    before = csv.field_size_limit()
    for name in ("a.csv", "a.tsv"):
        (tmp_path/name).write_text(table([{"pos": "long " * 40_000, "neg": "x"}], "\t" if name == "a.tsv" else ",", quoting=csv.QUOTE_ALL))
        assert len(load_pairs(tmp_path/name).pos[0]) == 199_999
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name, text, words", [
    ("a.csv", "pos,neg\n", "is empty: it holds no row"), ("a.tsv", "", "is empty"), ("a.json", "", "is empty"), ("a.json", "[]", "is empty"), ("a.jsonl", "\n \n", "is empty"), ("a.json", "{}", "a.json"),
    ("a.csv", "pos,neg\n\na,b\n\"two\nlines\",b\n\nc\n", "line 7: fewer cells than the header's 2"), ("a.csv", "pos,neg\na,b,c\n", "line 2: more cells"),
    ("a.tsv", 'pos\tneg\n"a" x\tb\nc\td\ne\n', "line 4: fewer cells"), ("a.csv", 'pos,neg\na,b\n"c" d,e\n', "line 3"), ("a.csv", 'pos,neg\na,b\n"c,d\ne,f\n', "line 3"),
    ("a.json", '{"pos": "a", "neg": "b"}\n{"pos": "a" "neg": "b"}\n', "line 2 is not valid JSON"), ("a.json", '[\n{"pos": "a"},\n{"pos" 3}]', "line 3 is not valid JSON"), ("a.jsonl", '{"pos": "a"\n{"pos": "b"}', "line 1 is not valid JSON"),
    ("a.json", '[{"pos": "a"}, "b"]', "item 2"), ("a.json", '[["a", "b"]]', "a list of objects"), ("a.json", "3", "a list of objects"), ("a.json", '"text"', "a list of objects"), ("a.json", "[1, 2]", "item 1"),
    ("a.json", '{"pos": ["a"], "neg": ["b", "c"]}', "columns of different lengths, pos 1, neg 2"), ("a.json", "[" * 100_000, "nested too deeply"), ("a.json", "[" * 900 + "]" * 900, "a.json"), ("a.jsonl", '{"pos": ' + "9" * 5000 + "}", "line 1 is not valid JSON"),
    ("a.json", '[{"pos": "a", "neg": "b"}, {"pos": "\\ud83d", "neg": "b"}]', "row 2, column 'pos': a text holds half of a character"), ("a.jsonl", '{"pos": "a", "neg": ["b", "c \\udc00"]}', "row 1, column 'neg'"),
    ("a.csv", "pos,neg\na,b\nc\0,d\n", "line 3 holds NUL"), ("a.txt", "a\0", "line 1 holds NUL"), ("a.csv", "pos,neg,pos\na,b,c\n", None), ("a.csv", "a;b,c\n1,2\n", "has the columns a;b, c"),
])
def test_what_cannot_be_read_is_said_with_its_place(tmp_path, name, text, words):
    (tmp_path/name).write_text(text, newline="")
    if words is None: assert load_pairs(tmp_path/name).pos == ["a"]  # of two columns of one name the first has it
    else: assert words in refused(load_pairs, tmp_path/name)


@pytest.mark.parametrize("name, data, words", [
    ("a.csv", "pos,neg\ncafé,b\n".encode("latin-1"), "is not UTF-8 text (byte 11)"), ("a.csv", "pos,neg\na,b\n".encode("utf-16-le"), "holds NUL"), ("a.csv", b"\xff\xfea", "is not UTF-16 text"),
    ("a.csv.gz", gzip.compress(b"pos,neg\na,b\n", mtime=0)[:-9], "cannot be unpacked"), ("a.csv.gz", b"\x1f\x8bnonsense", "cannot be unpacked"), ("a.parquet", b"PAR1", "not a parquet file"), ("a.csv.zip", b"PK", "unknown kind of file"),
])
def test_bytes_that_are_no_text(tmp_path, name, data, words):
    (tmp_path/name).write_bytes(data)
    assert words in refused(read_rows, tmp_path/name)


# ---- two files

def test_wanted_and_unwanted_in_two_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, texts in zip(("kind", "rude"), TEXTS):
        Path(f"{name}.json").write_text(json.dumps([{"instruction": t, "category": None} for t in texts]))
        Path(f"{name}.txt").write_text("\n".join(texts))
        Path(f"{name}.csv").write_text(table([{"reply": t, "id": i} for i, t in enumerate(texts)]))
    for ending, columns in (("json", None), ("txt", None), ("csv", None), ("csv", ("reply", "reply"))):
        pairs = load_pairs((f"kind.{ending}", f"rude.{ending}"), columns)
        assert (pairs.pos, pairs.neg) == TEXTS and len(set(pairs.groups)) == 24  # nothing says which belong together
    assert len(set(load_pairs(("kind.csv", "rude.csv"), group="id").groups)) == 12
    assert "leave out wanted_label=" in refused(load_pairs, ("kind.csv", "rude.csv"), wanted_label=1)
    assert load_pairs(("kind.txt", "rude.json")).neg == TEXTS[1]
    for columns in ([], ["--columns", "instruction"], ["--columns", "instruction,instruction"]): assert main(["check-pairs", "kind.json,rude.json", *columns]) == 0
    assert "wanted texts                               12" in capsys.readouterr().out
    Path("a,b.txt").write_text("x")
    assert "columns text" in fails(capsys, "check-pairs", "a,b.txt")  # a comma in a name is no second file
    assert "3 files" in fails(capsys, "check-pairs", "kind.txt,rude.txt,rude.txt")
    assert "no file none.txt" in fails(capsys, "check-pairs", "kind.txt,none.txt")
    assert "rude.json has no column 'text'" in fails(capsys, "check-pairs", "kind.txt,rude.json", "--columns", "text")
    assert "or give a second file" in fails(capsys, "check-pairs", "kind.json")


# ---- labels

def labelled(values, text="line number {} here"): return [{"text": text.format(i), "label": v} for i, v in enumerate(values)]


UNCLEAR = [[1, 0, 2], ["yes", "no"], ["Yes", "No", ""], ["positive", "negative", "neutral"], ["true", "false", "unknown"], [-1, 0, 1], [1, 2, 3, 4, 5], ["1 star", "5 stars"], ["truthful", "Neither", "made up"], ["A", "B"], ["good", "bad", "so so"],
           [True, False, None, "maybe"], [.1, .2, .9], ["0", "1", "Neither of the two"], ["Y", "N"], ["toxic", "civil"], ["1", "0", "-1"]]

@pytest.mark.parametrize("values", UNCLEAR, ids=str)
@pytest.mark.parametrize("names", [None, ("text", "label"), ("label", "text"), ("reply", "made_up"), ("made_up", "reply"), ("a", "b"), ("b", "a")], ids=str)
@pytest.mark.parametrize("times", [1, 2, 20])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_labels_that_do_not_say_it_are_asked_about(tmp_path, values, names, times, ending):
    renamed = dict(zip(("text", "label"), ("text", "label") if names is None or "label" in names else ("reply", "made_up") if "reply" in names else ("a", "b")))
    if times == 1 and renamed["label"] == "b": return  # a few cells below a name that says nothing
    rows = [{renamed[k]: v for k, v in r.items()} for r in labelled(values * times)]
    (tmp_path/f"a.{ending}").write_text(table(rows) if ending == "csv" else lines(rows))
    said = refused(load_pairs, tmp_path/f"a.{ending}", names)
    assert "does not say" in said and "wanted_label=" in said
    assert all(repr(v) in said or str(v) in said for v in values[:8] if v not in ("", None))
    if times > 1: assert f"({times})" in said


@pytest.mark.parametrize("yes, no", [(1, 0), ("1", "0"), (1., 0.), ("1.0", "0.0"), (True, False), ("True", "False"), ("good", "bad"), ("Wanted", "unwanted"), ("POSITIVE", "negative"), ("+1", "-1"), (1, -1), ("correct", "incorrect"), (" right ", "wrong")])
@pytest.mark.parametrize("blank", [[], ["", None], [float("nan")]])
def test_clear_labels_are_understood_and_blank_ones_left_out_with_a_count(tmp_path, capsys, yes, no, blank):
    (tmp_path/"a.jsonl").write_text(lines(labelled([yes, no, yes, *blank])))
    for columns in (None, ("text", "label"), ("label", "text")):
        pairs = load_pairs(tmp_path/"a.jsonl", columns)
        assert (pairs.pos, pairs.neg) == (["line number 0 here", "line number 2 here"], ["line number 1 here"])
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"wanted {str(yes).strip()!r} (2), unwanted {str(no).strip()!r} (1)" in err
        assert (f"; rows left out: {len(blank)} without a label)" in err) == bool(blank)


def test_labels_are_named_by_the_user(tmp_path, capsys):
    path = tmp_path/"a.csv"
    path.write_text(table([{"reply": f"line number {i} here", "made_up": ("no", "yes", "Neither", "")[i % 4]} for i in range(40)]))
    first = ["line number 0 here", "line number 4 here"]
    for columns in (None, ("reply", "made_up"), ("made_up", "reply")):
        pairs = load_pairs(path, columns, wanted_label="no", unwanted_label="yes")
        assert pairs.pos[:2] == first and (len(pairs.pos), len(pairs.neg)) == (10, 10)
        assert "rows left out: 10 without a label, 10 of other labels" in capsys.readouterr().err
    assert len(load_pairs(path, wanted_label=["no"], unwanted_label=["yes", "neither"]).neg) == len(load_pairs(path, wanted_label="no", unwanted_label="yes,Neither").neg) == 20
    assert "name those of both classes" in refused(load_pairs, path, wanted_label="no") and "none is 'never'" in refused(load_pairs, path, wanted_label="never", unwanted_label="yes")
    assert "each once" in refused(load_pairs, path, wanted_label="no", unwanted_label="no")
    capsys.readouterr()
    assert "such as --wanted-label no and --unwanted-label yes" in fails(capsys, "check-pairs", path) and "--unwanted-label" in fails(capsys, "check-pairs", path, "--wanted-label", "no")
    assert main(["check-pairs", str(path), "--wanted-label", "no", "--unwanted-label", "yes"]) == 0
    path.write_text(table(labelled(["4", "5", "1", "3"] * 3)))
    assert load_pairs(path, wanted_label=5, unwanted_label=1).pos[0] == "line number 1 here" and len(load_pairs(path, wanted_label="4,5", unwanted_label="1").pos) == 6
    path.write_text(table(labelled(["", " ", "nan"])))
    assert "column 'label' (labels) is empty in every row" in refused(load_pairs, path)
    path.write_text(table(labelled(["no", "yes"] * 3)))
    assert load_pairs(path, wanted_label="no").neg[0] == "line number 1 here"  # of two labels one is enough


@pytest.mark.parametrize("name", ["toxic", "is_hallucination", "Hateful", "made_up", "toxic_label"])
def test_one_is_not_wanted_where_it_says_that_something_bad_is_there(tmp_path, name):
    (tmp_path/"a.csv").write_text(table([{"reply": f"line {i}", name: i % 2} for i in range(20)]))
    assert f"whether {name} is wanted" in refused(load_pairs, tmp_path/"a.csv") and "wanted_label=" in refused(load_pairs, tmp_path/"a.csv", ("reply", name))
    assert "such as wanted_label='0' and unwanted_label='1'" in refused(load_pairs, tmp_path/"a.csv")
    assert load_pairs(tmp_path/"a.csv", wanted_label=0, unwanted_label=1).pos[0] == "line 0"


def test_short_answers_are_texts_and_flags_are_not(tmp_path):
    for values in (("(A)", "(B)"), ("Yes", "No"), ("true", "false"), ("12", "15")):
        rows = [{"question": f"Is it {i}?", "a": values[i % 2], "b": values[1 - i % 2]} for i in range(20)]
        (tmp_path/"a.jsonl").write_text(lines(rows))
        assert load_pairs(tmp_path/"a.jsonl", ("a", "b")).pos_answers[:2] == list(values)
    (tmp_path/"a.jsonl").write_text(lines([{"pos": f"An answer with reasons, {i}.", "neg": "No."} for i in range(20)]))
    assert set(load_pairs(tmp_path/"a.jsonl").neg) == {"No."}  # the names say what they are
    (tmp_path/"a.csv").write_text(table([{"text": f"t {i}", "positive": i % 2, "negative": 1 - i % 2} for i in range(8)]))
    assert "nothing but 0 and 1" in refused(load_pairs, tmp_path/"a.csv")
    (tmp_path/"a.csv").write_text(table([{"a": f"a sentence {i}", "target": f"another sentence {i}"} for i in range(30)]))
    assert load_pairs(tmp_path/"a.csv", ("a", "target")).neg[0] == "another sentence 0"


def test_a_question_that_is_missing_is_named(tmp_path):
    (tmp_path/"a.jsonl").write_text(lines([{"q": "Why?", "pos": "a", "neg": "b"}, {"q": None, "pos": "a", "neg": "b"}]))
    assert "row 2: column 'q' holds no question" in refused(load_pairs, tmp_path/"a.jsonl", question="q")


# ---- published sets, with invented words

ask = "Do trees whistle?\n\nChoices:\n (A) No\n (B) Yes"

@pytest.mark.parametrize("rows, pos, neg, said", [
    ([{"question": ask, "answer_matching_behavior": f" ({a})", "answer_not_matching_behavior": f" ({b})"} for a, b in ("AB", "BA") * 4], f"Q: {ask}\nA: (A)", f"Q: {ask}\nA: (B)", "wanted 'answer_matching_behavior', unwanted 'answer_not_matching_behavior', question 'question'"),
    ([{"knowledge": "Trees are silent.", "question": "Do trees whistle?", "right_answer": "No.", "hallucinated_answer": "At noon."}] * 2, "Q: Do trees whistle?\nA: No.", "Q: Do trees whistle?\nA: At noon.", "unwanted 'hallucinated_answer'"),
    ([{"knowledge": "x", "dialogue_history": "[Human]: Do trees whistle?", "right_response": "No.", "hallucinated_response": "At noon."}], "Q: [Human]: Do trees whistle?\nA: No.", None, "question 'dialogue_history'"),
    ([{"document": "Trees are silent.", "right_summary": "No sound.", "hallucinated_summary": "Songs."}], "Q: Trees are silent.\nA: No sound.", None, "question 'document'"),
    ([{"ID": str(i), "user_query": "Do trees whistle?", "chatgpt_response": ("No.", "At noon.")[i % 2], "hallucination": ("no", "yes")[i % 2], "hallucination_spans": []} for i in range(4)], "Q: Do trees whistle?\nA: No.", "Q: Do trees whistle?\nA: At noon.", "label 'hallucination' (wanted 'no' (2), unwanted 'yes' (2))"),
    ([{"": "0", "sent_more": "Foxes lie.", "sent_less": "Owls lie.", "stereo_antistereo": "stereo", "bias_type": "species"}, {"": "1", "sent_more": "Foxes steal.", "sent_less": "Owls steal.", "stereo_antistereo": "antistereo", "bias_type": "species"}], "Owls lie.", "Foxes lie.", "wanted 'sent_less', unwanted 'sent_more'"),
    ([{"statement": f"Trees are {w}.", "label": y, "city": "x"} for w, y in (("silent", 1), ("loud", 0))], "Trees are silent.", "Trees are loud.", "text 'statement', label 'label' (wanted '1' (1), unwanted '0' (1))"),
    ([{"prompt": "Do trees whistle?", "completion": c, "label": y} for c, y in (("No.", True), ("Yes.", False))], "Q: Do trees whistle?\nA: No.", "Q: Do trees whistle?\nA: Yes.", "text 'completion'"),
    ([{"Type": "x", "Category": "y", "Question": "Do trees whistle?", "Best Answer": "No.", "Correct Answers": "No.; Never.", "Incorrect Answers": "Yes.;"}], "Q: Do trees whistle?\nA: No.", "Q: Do trees whistle?\nA: Yes.", "wanted 'Correct Answers'"),
    ([{"question": "Do trees whistle?", "best_answer": "No.", "correct_answers": ["No.", "Never."], "incorrect_answers": ["Yes."]}], "Q: Do trees whistle?\nA: No.", "Q: Do trees whistle?\nA: Yes.", "unwanted 'incorrect_answers'"),
    ([{"prompt": {"text": "The tree", "toxicity": .1}, "continuation": {"text": f" {w}", "toxicity": t}} for w, t in (("sang.", .1), ("swore.", .9), ("fell.", None))], "The tree sang.", "The tree swore.", "wanted below 0.5 (1), unwanted from 0.5 on (1); rows left out: 1 without a label"),
    ([{"id": i, "comment_text": t, "toxic": y, "severe_toxic": 0, "obscene": 0} for i, (t, y) in enumerate((("Nice tree.", 0), ("Rude tree.", 1)))], "Nice tree.", "Rude tree.", "unwanted '1'"),
    ([{"conversations": [{"from": "human", "value": "Do trees whistle?"}], "chosen": {"from": "gpt", "value": "No."}, "rejected": {"from": "gpt", "value": "Yes."}}], ([{"role": "user", "content": "Do trees whistle?"}], "No."), None, "question 'conversations'"),
])
def test_published_sets_are_known_by_their_columns(tmp_path, capsys, rows, pos, neg, said):
    (tmp_path/"a.jsonl").write_text(lines(rows))
    files = ["a.jsonl"]
    if not any(isinstance(v, (list, dict, bool)) for r in rows for v in r.values()):
        (tmp_path/"a.csv").write_text(table(rows))
        files.append("a.csv")
    for name in files:
        pairs = load_pairs(tmp_path/name)
        err = capsys.readouterr().err
        assert pairs.pos[0] == pos and (neg is None or pairs.neg[0] == neg)
        assert said in err and err.count("\n") == 1 and err.startswith(f"odesteer: {name}: ")


# ---- a look at pairs

def test_balanced_letters_are_no_stock_answer():
    ask = [f"Is it {i}?" for i in range(60)]
    sides = [[f"({'AB'[(i + k) % 2]})" for i in range(60)] for k in (0, 1)]
    pairs = Pairs(*([f"Q: {q}\nA: {a}" for q, a in zip(ask, side)] for side in sides), ask, ask, pos_answers=sides[0], neg_answers=sides[1])
    found = check_pairs(pairs)
    assert found.ok and not any("stock" in text or "both labels" in text for _, text in found.findings)
    one_sided = Pairs(pairs.pos, pairs.neg, ask, ask, pos_answers=["(A)"] * 60, neg_answers=["(B)"] * 60)
    assert sum("stock answer" in text for _, text in check_pairs(one_sided).findings) == 2


def test_case_makes_another_text():
    texts = [f"the answer is number {i}" for i in range(60)]
    found = check_pairs(Pairs([t.upper() for t in texts], texts, list(range(60)), list(range(60))))
    assert found.numbers["texts under both labels (conflicts)"] == 0 and found.ok


def test_an_auc_far_below_one_half_is_explained():
    words = [f"word{i} " * 3 for i in range(60)]  # each pair has a word of its own, and nothing says that it is a pair
    pairs = Pairs([w + "yes" for w in words], [w + "yes" for w in words[:-1]] + ["word0 no"], list(range(60)), list(range(60, 120)))
    found = check_pairs(pairs)
    assert found.numbers["held-out AUC of bag of words alone"] < .3
    assert any("bag of words alone predicts the wrong class" in text and "name the question or group" in text for _, text in found.findings)


def test_texts_without_words_are_looked_at(tmp_path):
    (tmp_path/"a.csv").write_text(table([{"pos": "!" * (i + 1), "neg": "?" * (i + 1)} for i in range(12)]))
    assert check_pairs(load_pairs(tmp_path/"a.csv")).numbers["held-out AUC of best word alone"] == .5


# ---- the shell

def test_every_command_reads_two_files_and_named_labels(tmp_path, capsys, monkeypatch):
    "fit, demo and sites read as check-pairs does; what they refuse is said in the words of the shell"
    monkeypatch.chdir(tmp_path)
    def loaded(*_, **__): raise OSError("the model is asked for")
    for module in (commands, demo):
        for name in ("load_model", "count_layers"): monkeypatch.setattr(module, name, loaded)
    for name, texts in zip(("kind", "rude"), TEXTS): Path(f"{name}.txt").write_text("\n".join(texts))
    Path("said.csv").write_text(table(labelled(["yes", "no", "Not sure"] * 6)))
    for command in (["fit", "--out", "s"], ["sites"], ["demo", "--prompts", "kind.txt"]):
        line = [*command, "--model", "m", "--pairs"]
        for good in (["kind.txt,rude.txt"], ["said.csv", "--wanted-label", "yes,Not sure", "--unwanted-label", "no"], ["said.csv", "--columns", "label,text", "--unwanted-label", "no", "--wanted-label", "yes"]):
            assert "the model is asked for" in fails(capsys, *line, *good).splitlines()[-1]
        said = fails(capsys, *line, "said.csv")
        assert "'yes' (6), 'no' (6), 'Not sure' (6)" in said and "--wanted-label yes and --unwanted-label no" in said and "label=" not in said


@pytest.mark.parametrize("line, words", [
    ("realtoxicityprompts", "--data FILE, --judge trained and --option filter=none"), ("truthfulqa-binary", "--data FILE, with the authors' columns"), ("truthfulqa", "truthfulqa-binary with --data FILE and --option form=text"),
    ("refusal --data bad.json", "--judge markers and --data HARMFUL,FILE"), ("truthfulqa-binary --data qa.json --option wrong=best", "or leave out --option wrong=best"), ("concept --data about.json --option target=chess --judge prevalence", "as --option target"),
    ("realtoxicityprompts --data toxic.json --judge trained --option filter=none", "give smaller --option n_val, --option n_test"), ("realtoxicityprompts --data scored.json --judge trained --option filter=none", "scored.json, row 2, prompt.toxicity is 'high', no number"),
    ("style --data style.json", "a row needs question, topic, wanted and unwanted"),
])
def test_errors_of_tasks_name_options(tmp_path, capsys, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    def away(*_, **__): raise ConnectionError("no hub")
    monkeypatch.setattr(datasets, "load_dataset", away)
    monkeypatch.setattr(plans, "load_model", lambda *_: (None, None))
    monkeypatch.setattr(plans, "count_layers", lambda *_: 4)
    monkeypatch.setattr(plans, "_judge", lambda *_: None)
    kept = dict(bad=[f"Do harm {i}." for i in range(20)], qa=[{"question": f"Is it {i}?", "correct_answers": ["Yes."], "incorrect_answers": ["No."]} for i in range(12)], about=[{"concept": c, "sentence": f"A {c}."} for c in ("ball", "card")],
                toxic=[{"prompt": {"text": f"Start {i}", "toxicity": .9}, "continuation": {"text": "end", "toxicity": .1}} for i in range(9)], scored=[{"prompt": {"text": "a", "toxicity": t}} for t in (.1, "high")], style=[{"style": "capitals", "question": "Why?"}])
    for name, rows in kept.items(): Path(f"{name}.json").write_text(json.dumps(rows))
    said = fails(capsys, "bench", *line.split(), "--model", "m", "--methods", "caa", "--layers", 0, "--T", 1, "--dtype", "float32").splitlines()[-1]
    assert words in said and not any(f" {name}=" in said.replace(f"--option {name}=", "") for name in ("path", "judge", "filter", "form", "target", "n_val", "wrong", "harmless"))


def test_messages_in_the_words_of_the_shell():
    from argparse import Namespace
    said = lambda text, **o: cli._as_options(text, Namespace(**o))
    assert said("use T=, spread= or a larger max_new_tokens=.", T=1, spread=None, max_new_tokens=3) == "use --T, --spread or a larger --max-new-tokens."
    assert said("write --option filter=none, odesteer:metric=covariance or ridge=", filter=1, metric=1) == "write --option filter=none, odesteer:metric=covariance or ridge="
    assert said("say layer= (none is known)", layer=None) == "say --layer (none is known)" and cli._as_options("give layer=", None) == "give layer="


# ---- texts in memory

def test_tables_and_columns_of_pandas(tmp_path):
    pd = pytest.importorskip("pandas")
    df = pd.DataFrame(labelled([1, 0, 1, None, 0]), index=[3, 1, 4, 1, 5])
    kept = df[df.label == 1].text
    texts = ContrastTexts(kept, df[df.label == 0].text.to_numpy(), np.arange(2), pd.Series([0, 1], index=[7, 9]))
    assert texts.pos == ["line number 0 here", "line number 2 here"] and texts.neg[1] == "line number 4 here" and texts.neg_groups == [0, 1]
    assert all(type(t) is list for t in (texts.pos, texts.neg, texts.pos_groups, texts.neg_groups))
    assert load_pairs(df).pos == texts.pos and load_pairs((kept, df[df.label == 0].text)).neg == texts.neg
    assert [p.text for p in load_prompts(kept)] == texts.pos and load_pairs(labelled([1, 0])).neg == ["line number 1 here"]
    assert "pos is a table with the columns text, label" in refused(ContrastTexts, df, texts.neg, [0], [0])
    assert "neg[1] is nan, no text" in refused(ContrastTexts, texts.pos, pd.Series(["a", float("nan")]), [0, 1], [0, 1])
    assert "pos must be a list" in refused(ContrastTexts, "a text", ["b"], [0], [0])
    for wrong in (df, kept, (texts.pos, texts.neg)): assert "load_pairs" in refused(fit_steerer, None, None, wrong, "caa")


def test_a_data_set_in_memory():
    import datasets
    made = datasets.Dataset.from_list(ROWS)
    for source in (made, datasets.DatasetDict(train=made), {"train": ROWS}, columns): assert load_pairs(source).pos == TEXTS[0]


# ---- anything at all

cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8) | st.sampled_from(["yes", "no", "1", "0", '"', '"a" b', "Neither", "nan", "a,b", "a\tb", ";", "[]", "1.5e400"])
anything = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=6), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["pos", "neg", "text", "label", "question", "train", "data", "role", "content", "from", "value"]) | st.text(max_size=4), x, max_size=4), max_leaves=12)

@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.lists(st.lists(cells, min_size=1, max_size=3), max_size=5).map(lambda rows: "\n".join(map(",".join, [["text", "label"], *rows])).encode())
       | st.lists(st.lists(cells, min_size=2, max_size=2), max_size=5).map(lambda rows: "\n".join(map("\t".join, [["pos", "neg"], *rows])).encode())
       | anything.map(json.dumps).map(str.encode) | st.lists(anything, max_size=4).map(lines).map(str.encode),
       st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".txt", ".csv.gz"]), st.sampled_from([{}, dict(columns=("text", "label")), dict(question="question"), dict(group="label", columns=("pos", "neg")), dict(wanted_label="yes"), dict(template="chat", sep=",")]))
@example(b'{"text": {"a": 1}, "label": 1}', ".json", {})
@example(b'[{"pos": [{"role": "user"}], "neg": "b"}]', ".json", {})
@example(b'[{"pos": "a", "neg": "b", "label": ["x"]}]', ".json", dict(group="label", columns=("pos", "neg")))
def test_any_bytes_give_texts_or_one_line(tmp_path, data, ending, how):
    path = tmp_path/f"f{ending}"
    path.write_bytes(data)
    for call in (lambda: load_pairs(path, **how), lambda: load_prompts(path), lambda: load_prompts(path, "text")):
        try: found = call()
        except ValueError as e:
            assert "\n" not in str(e) and len(str(e)) < 2000
            continue
        if isinstance(found, Pairs):
            assert found.pos and found.neg
            check_pairs(found)
            for text in found.pos_answers + found.neg_answers: text.encode()
        else: assert found


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["yes", "no", "1", "0", "2", "Neither", "", "true", "positive", "neutral", "4", "unknown", "class 7"]), min_size=4, max_size=30), st.booleans(), st.sampled_from(["label", "made_up", "sentiment", "is_kind", "grade"]))
def test_label_values_are_never_texts(tmp_path, values, swapped, name):
    (tmp_path/"f.csv").write_text(table([{"reply": f"an answer, number {i}", name: v} for i, v in enumerate(values * 2)]))
    try: pairs = load_pairs(tmp_path/"f.csv", ("reply", name)[::-1 if swapped else 1])
    except ValueError as e: assert "\n" not in str(e)
    else: assert all(t.startswith("an answer") for t in pairs.pos + pairs.neg)


# ---- answers that are drawn

@pytest.mark.parametrize("temperature, top_k, top_p", [(.7, 0, .9), (1., 50, .9), (1.3, 5, .3), (.5, 0, .01), (1., None, .999)])
def test_the_tokens_kept_are_those_of_transformers(temperature, top_k, top_p):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    warpers = [TemperatureLogitsWarper(temperature), *([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(top_p)]
    rng, ids, cut = torch.Generator().manual_seed(0), torch.zeros(12, 1, dtype=torch.long), 0
    for wide, round_to in ((4, torch.float32), (4, torch.bfloat16), (.02, torch.bfloat16), (0, torch.float32), (60, torch.float16)):
        logits = (wide * torch.randn(12, 997, generator=rng)).to(round_to).float()  # in 16 bits many are equal
        logits[3, 5:] = -torch.inf
        kept = LogitsProcessorList(warpers)(ids, logits.clone())
        assert torch.equal(data._Nucleus(temperature, top_k, top_p)(ids, logits), kept)
        cut += (kept == -torch.inf).sum()
    assert cut > 0


def test_drawn_answers_are_those_of_generate():
    model, tok = tiny_model("llama"), tiny_tokenizer()
    prompts, quick = ["the king", "a", "a queen in the garden"], data._quick_draws
    for how in ({}, dict(top_k=5), dict(top_p=.5, repetition_penalty=1.3), dict(temperature=1., top_p=1.), dict(do_sample=False, temperature=None, top_p=None, top_k=None), dict(min_p=.1)):
        wanted = ods.generate_text(model, tok, prompts, seed=7, **(data.SAMPLING | dict(max_new_tokens=12) | how))
        assert data.sample_batch(model, tok, prompts, 7, 0, max_new_tokens=12, **how) == wanted
    assert "logits_processor" in quick(model, data.SAMPLING | dict(max_new_tokens=3)) and quick(model, data.SAMPLING | dict(num_beams=2)) == data.SAMPLING | dict(num_beams=2)
    model.generation_config.num_beams = 3
    assert quick(model, data.SAMPLING) == data.SAMPLING, "beams keep more tokens"

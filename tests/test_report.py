"Reports of made-up studies whose answers are known: tables, verdicts, figures, files"
import csv
import html as html_module
import io
import itertools
import json
import re
import unicodedata

import numpy as np
import pytest

from odesteer.report import Gain, Table, as_written, figures, file_names, main_table, report, strength_figure, tables, together, verdicts
from odesteer.results import as_results, guardrail_rows
from odesteer.statistics import bootstrap_interval

from .studies import SPEC, Study, make_toy, quick, row, write_guardrails


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def results(toy): return quick(toy)


def test_a_report_where_nothing_was_safe(tmp_path):
    import matplotlib
    matplotlib.use("agg")
    s = Study(tmp_path/"runs").base()
    for method in ("odesteer", "step-odesteer", "caa", "random"):
        s.run("steer", method, {}, 2, {"share": .2}, "val")
        s.choice(method, layer=None, strength=None)
    r = report(tmp_path/"runs", tmp_path/"report", resamples=99)
    assert verdicts(r) == {"toy, toy": []} and r["scopes"][0]["curves"]["caa"]["chosen"][0].strength == .2  # where it was tried
    assert (tmp_path/"report"/"report.md").read_text().count("no safe strength") == 4
    assert {p.name for p in (tmp_path/"report"/"figures").iterdir()} == {"toy-toy-strength.png", "toy-toy-layers.png", "toy-toy-pareto.png"}


def test_a_report_without_validation_runs(tmp_path):
    s = Study(tmp_path/"runs")
    s.run("none")
    assert [r["arm"] for r in report(tmp_path/"runs", tmp_path/"report", resamples=99)["scopes"][0]["rows"]] == ["unsteered"]


def test_a_placebo_cannot_be_best(tmp_path):
    Study(tmp_path).base().method("random", .9).method("caa", .3)
    table = main_table(quick(tmp_path)["scopes"][0])
    assert table.rows[0][0] == "random (placebo)" and table.rows[table.best][0] == "caa"


@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("effect, noise, words", [(.5, .1, "No: many steps are better"), (-.5, .1, "Yes, and it is better than many"), (0., 1., "no clear difference")])
def test_verdicts_turn_with_the_sign_and_the_interval(tmp_path, way, effect, noise, words):
    s = Study(tmp_path, spec={**SPEC, "better": {"reward": way, "info": 1}}).base()
    s.method("step-odesteer", way*.2).method("odesteer", way*(.2 + effect), noise=noise)
    r = quick(tmp_path)
    verdict = {v.question: v for v in verdicts(r)["toy, toy"]}["Is one step enough?"]
    assert words in verdict.claim and "n=40" in verdict.evidence[0]
    many, one = (row(r, arm)["metrics"]["reward"].mean.value for arm in ("odesteer", "step-odesteer"))
    d = many - one
    assert f"{way*d:+.3f}" in verdict.evidence[0] and (way*d > 0) == ("at chosen settings +" in verdict.evidence[0])


def test_all_verdicts(results):
    answers = {v.question: str(v) for v in verdicts(results)["toy, toy (2 models)"]}
    assert "**Yes: odesteer is better than caa, iti**" in answers["Is nonlinearity worth it?"]
    assert "**Yes: rk4 (at equal share (mean of 2)) is worse than euler**" in answers["Does the solver matter?"]
    assert "no guardrail clearly worse" in answers["What does it cost?"] and "speed x 0.80" in answers["What does it cost?"]
    assert "**Yes, 4 of 4: caa, iti, odesteer, step-odesteer**" in answers["Is any method better than every placebo?"]
    assert "3 of 4: caa, odesteer, step-odesteer" in answers["Is any method better than asking in the prompt?"] and "Does the metric matter?" not in answers


def test_a_placebo_without_safe_strength_is_no_steering(tmp_path):
    s = Study(tmp_path).base().method("caa", .5).method("iti", -.5)
    s.choice("random", layer=None, strength=None)
    verdict, = (v for v in verdicts(quick(tmp_path))["toy, toy"] if "placebo" in v.question)
    assert verdict.claim == "Yes, 1 of 2: caa; worse: iti (random had no safe strength and stands for no steering)"


def test_a_guardrail_that_falls_is_named(tmp_path):
    s = Study(tmp_path).base().method("caa", .5)
    s.run("steer", "caa", {}, 1, {"share": .4}, scores={"reward": s.luck + .5, "info": np.tile([0., 1.], 20)})
    assert "clearly worse info" in str(verdicts(quick(tmp_path))["toy, toy"][-1])


def test_many_tries_need_more_evidence():
    gains = {k: Gain(.1, .01, .2, .03, 50) for k in "abc"}
    assert {g.reading for g in gains.values()} == {"better than"}
    assert {g.reading for g in together(gains).values()} == {"no clear difference from"}
    assert Gain(.1, None, None, 1., 2).reading == "no clear difference from"
    assert (-Gain(.1, .01, .2, .03, 50)).reading == "worse than" and str(-Gain(.1, .01, .2, .03, 50)) == "-0.100 [-0.200, -0.010], n=50"


def test_tables_can_be_read_back(results):
    scope = results["scopes"][0]
    back = list(csv.DictReader(io.StringIO(main_table(scope).csv())))
    assert len(back) == len(scope["rows"])
    for line in back:
        r = row(results, line["arm"].replace(" (placebo)", ""))
        if r["arm"] == "repe": assert line["reward"] == "" and line["strength"] == "no safe strength"; continue
        assert [float(line[k]) for k in ("reward", "reward low", "reward high")] == list(r["metrics"]["reward"].mean)
        if r["arm"] == "unsteered": continue
        assert float(line["change of reward low"]) == r["metrics"]["reward"].change.lo and float(line["p (Holm)"]) == r["holm"]
    values = [float(line["reward"]) for line in back if line["reward"]]
    assert values == sorted(values, reverse=True)
    study = list(csv.DictReader(io.StringIO(tables(results)["toy, toy, solver"].csv())))
    assert {line["arm"] for line in study} == {"euler", "midpoint", "rk4"} and study[0]["change"] == "reference"


def test_where_nothing_was_safe_the_table_says_so(tmp_path, results):
    table = main_table(results["scopes"][0])
    assert table.rows[-1][0] == "repe" and table.rows[-1][-1] == "no safe strength" and table.rows[table.best][0] == "odesteer"
    for k in range(2):
        s = Study(tmp_path, f"toy {k}").base()
        if k: s.method("caa", 1.)
        else: s.choice("caa", layer=None, strength=None)
    assert "off in 1 of 2 models" in str(main_table(quick(tmp_path)["scopes"][0]).cells())


def test_less_is_better_sorts_the_other_way(tmp_path):
    Study(tmp_path, spec={**SPEC, "better": {"reward": -1, "info": 1}}).base().method("caa", -.5).method("iti", .5)
    assert [r[0] for r in main_table(quick(tmp_path)["scopes"][0]).rows] == ["caa", "unsteered", "iti"]


def test_markup_is_escaped():
    specials = "a_b & 50 % $x$ #1 {y} ~z ^w \\v <u> |t|"
    t = Table(specials, ["x_y", specials], [[specials, [1., .5, 1.5]], ["", None]], best=0, note=specials)
    tex = t.latex()
    body = tex.replace("\\textbackslash{}", "").replace("\\textasciitilde{}", "").replace("\\textasciicircum{}", "")
    for c in "_%$#": assert f"\\{c}" in body and c not in body.replace(f"\\{c}", "")
    assert "~" not in body and "^" not in body and len(re.findall(r"(?<!\\)&", tex)) == 3  # one separator in each of three rows
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(c, 0) for c in tex.replace("\\{", "").replace("\\}", "")))
    assert min(depth) == 0 == depth[-1]
    line = t.markdown().split("\n\n")[1].split("\n")[2]
    assert line.replace("\\|", "").count("|") == 3
    assert list(csv.reader(io.StringIO(t.csv())))[1] == [specials, "1.0", "0.5", "1.5"]


ODD = ["x <script>alert(1)</script>", "<!-- hidden", "a & b &lt;i&gt; &#60;", "![i](http://e.x/i.png)", "[l](http://e.x)", "[l]: http://e.x", "a\n# Verdict: proven", "a\r\n\r\n| x | y |", "a|b", "`code` ``", "*b* __c__ _d_ ~~e~~",
       "# head", "> quote", "- item", "$x^2$ and $$", "{{< include x.md >}}", "\\", "a\u202eb\u2028c\x1b[31m", "lone \ud800", "&amp;", "../../up", "CON", "." * 30]


@pytest.mark.parametrize("name", [*ODD, *(f"{c} text {c * 2} more" for c in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")])
def test_text_is_shown_as_it_is_written(name):
    "By an independent reader of Markdown: no element but the paragraph, and the text is the name's"
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(f"before {as_written(name)} after")
    assert re.findall(r"<(?!/)[^>]*>", html) == ["<p>"]
    shown = "".join(c if c.isprintable() else " " for c in name)
    assert html_module.unescape(re.sub(r"</?p>", "", html)).strip() == " ".join(f"before {shown} after".split())
    for start in "", "# ", "- ", "**":
        line = markdown_it.MarkdownIt("commonmark", {"html": True}).render(f"{start}{as_written(name)}")
        assert not re.search(r"<(script|img|a|code|em|del|blockquote|h2|hr|table|ul>\s*<li>\s*<ul)\b", line) and "<!--" not in line


def odd_study(out, model, effect=.3, task=None):
    s = Study(out, model=model, world=None)
    s.about = {k: v for k, v in s.about.items() if v is not None} | {"sha256": repr(model)}
    s.held = lambda: dict(task=task or "toy", data={"sha256": "d"}, model=s.about)
    return s.base().method("caa", effect)


def shape(folder):
    "What each line of a report begins with"
    return [found and found.group() for line in (folder/"report.md").read_text().splitlines() for found in [re.match(r"#+ |!\[|- |\*\*|\||$", line)]]


@pytest.fixture(scope="module")
def plain_shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    odd_study(folder/"runs", "m", task="t")
    report(folder/"runs", folder/"report", resamples=19)
    return shape(folder/"report")


@pytest.mark.parametrize("name", ODD)
def test_a_name_cannot_write_into_a_report(tmp_path, name, plain_shape):
    odd_study(tmp_path/"runs", name, task=name)
    report(tmp_path/"runs", tmp_path/"report", resamples=19)
    odd = (tmp_path/"report"/"report.md").read_text()
    assert shape(tmp_path/"report") == plain_shape  # the same headings, pictures and tables
    assert not re.search(r"<script|<!--|(?<!\\)\]\(http|\x1b|\u202e", odd)
    for file in re.findall(r"\]\((figures/.*?)\)", odd): assert (tmp_path/"report"/file).is_file()
    files = [p.relative_to(tmp_path/"report").parts for p in (tmp_path/"report").rglob("*") if p.is_file()]
    assert {len(f) for f in files} == {1, 2} and all(re.fullmatch(r"[\w-]+\.(csv|tex|png|json|md)", f[-1]) for f in files)


@pytest.mark.parametrize("names", [("m.1", "m-1"), ("M", "m"), ("a b", "a_b", "a-b"), ("é", "e\u0301"), ("x" * 240, "x" * 239 + "y"), ("名" * 240, "名" * 239 + "字"), ("m", "m/")])
def test_names_that_differ_have_files_that_differ(tmp_path, names):
    assert len({unicodedata.normalize("NFC", f).casefold() for f in file_names(names).values()}) == len(names)
    assert all(len(f.encode()) <= 140 for f in file_names([f"toy, {n}, strength" for n in names]).values())
    for i, name in enumerate(names): odd_study(tmp_path/"runs", name, effect=.1 + .3*i)
    report(tmp_path/"runs", tmp_path/"report", resamples=19)
    text = (tmp_path/"report"/"report.md").read_text()
    figures = re.findall(r"\]\((figures/.*?)\)", text)
    assert len(figures) == len(set(figures)) == 3 * len(names) and len({(tmp_path/"report"/f).read_bytes() for f in figures if "pareto" in f}) == len(names)
    tables = [p.read_text() for p in sorted((tmp_path/"report"/"tables").glob("*.csv")) if not p.stem.endswith("pairs") and "pairs" not in p.stem]
    assert len(tables) == len(set(tables)) == len(names)


def test_models_of_one_name_are_numbered(tmp_path):
    "Folders are often called model; two of them are two models"
    for i in range(3):
        s = Study(tmp_path/"runs", model="model", world=None)
        s.about = {"name": "model", "sha256": f"{i}"}
        s.base().method("caa", .1 + .3*i)
    r = report(tmp_path/"runs", tmp_path/"report", resamples=19)
    assert [s["name"] for s in r["scopes"]] == ["model", "model (2)", "model (3)"] and len(tables(r)) == len(verdicts(r)) == 3
    assert len(list((tmp_path/"report"/"tables").glob("*.csv"))) == 3


def test_a_dollar_begins_no_formula_in_a_figure(tmp_path):
    import matplotlib.pyplot as plt
    spec = {"primary": "$reward^$", "better": {"$reward^$": 1, "$x$": 1}, "watch": ["$x$"]}
    s = Study(tmp_path/"runs", spec=spec)
    def scores(effect): return {"$reward^$": s.luck + effect, "$x$": np.ones(len(s.luck))}
    for split in "val", "test": s.run("none", split=split, scores=scores(0.))
    s.run("steer", "caa", {}, 1, {"share": .4}, "val", scores=scores(.3))
    s.run("steer", "caa", {}, 1, {"share": .4}, scores=scores(.3))
    s.choice("caa")
    found = quick(tmp_path/"runs")
    for name, figure in figures(found):
        figure.canvas.draw()
        plt.close(figure)
        words = [t.get_text() for ax in figure.axes for t in (ax.title, ax.xaxis.label, ax.yaxis.label)] + [figure.get_supylabel(), figure.get_suptitle()]
        assert any(r"\$" in w for w in words) and not any(re.search(r"(?<!\\)\$", w) for w in words), name
    assert r"\$reward\^\$" in main_table(found["scopes"][0]).markdown()


def test_results_survive_json_and_are_enough_for_the_report(results, tmp_path):
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    stored = json.loads(json.dumps(results, allow_nan=False))
    assert report(stored, tmp_path) == results and json.loads((tmp_path/"results.json").read_text()) == stored
    assert verdicts(stored) == verdicts(results) and tables(stored) == tables(results) and not plt.get_fignums()
    text = (tmp_path/"report.md").read_text()
    pictures = {p.name for p in (tmp_path/"figures").iterdir()}
    assert {line.split("figures/")[1].rstrip(")") for line in text.split("\n") if line.startswith("![")} == pictures and len(pictures) == len(list(figures_of(results)))
    assert all(str(v) in text for answers in verdicts(results).values() for v in answers) and "stopped at 0.4: enough" in text
    assert {p.suffix for p in (tmp_path/"tables").iterdir()} == {".csv", ".tex"} and len(list((tmp_path/"tables").iterdir())) == 2*len(tables(results))


def figures_of(results):
    import matplotlib.pyplot as plt
    for name, figure in figures(results): plt.close(figure); yield name


def test_guardrail_tasks_stand_in_the_report(tmp_path):
    Study(tmp_path/"a").base().method("caa", .3)
    rng = np.random.default_rng(0)
    before, after = ({"mmlu_law": rng.integers(2, size=40).tolist(), "mmlu_art": rng.integers(2, size=20).tolist(), "arc": rng.integers(2, size=30).tolist()} for _ in range(2))
    for right in (before, after): right["mmlu"] = right["mmlu_law"] + right["mmlu_art"]
    write_guardrails(tmp_path/"a", before)
    write_guardrails(tmp_path/"b", after, method="caa", layer=1, strength={"share": .4})
    write_guardrails(tmp_path/"b", before)  # another machine asked the unsteered model too
    write_guardrails(tmp_path/"b", {"arc": [1]*5}, {"tasks": "arc", "limit": 5}, method="iti", layer=2, strength={"T": 1.})  # and nobody asked it like this
    (tmp_path/"b"/"guardrails"/"0.json").write_text("{")
    found = quick([tmp_path/"a", tmp_path/"b"])
    rows = {(r["method"], r["task"]): r for r in found["guardrails"]}
    assert set(rows) == {("unsteered", "mmlu"), ("unsteered", "arc"), ("caa", "mmlu"), ("caa", "arc"), ("iti", "arc")} and found["runs"]["damaged"] == 1
    for task in ("mmlu", "arc"):
        x, y = (np.array(right[task], float) for right in (before, after))
        e = bootstrap_interval(y - x)
        r = rows["caa", task]
        assert r["score"] == pytest.approx(y.mean(), abs=1e-4) and r["n"] == len(x)
        assert r["change"] == pytest.approx((e.value, e.lo, e.hi), abs=1e-3)
    assert rows["iti", "arc"]["change"] is None and rows["unsteered", "mmlu"]["change"] is None
    report(found, tmp_path/"r")
    table = tables(found)["guardrail tasks"]
    assert table.markdown() in (tmp_path/"r"/"report.md").read_text() and "| toy 0 | mmlu | acc | caa | 1 | share 0.4 |" in table.markdown()
    assert [(r["arm"], r["task"], r["questions"]) for r in csv.DictReader(open(tmp_path/"r"/"tables"/"guardrail-tasks.csv"))] == [(r["method"], r["task"], str(r["n"])) for r in found["guardrails"]]
    assert r"\toprule" in (tmp_path/"r"/"tables"/"guardrail-tasks.tex").read_text()
    assert guardrail_rows(tmp_path/"a") == [r for r in found["guardrails"] if r["method"] == "unsteered"]


def test_an_axis_says_what_its_strengths_count(tmp_path, results):
    import matplotlib
    matplotlib.use("agg")
    assert "units" not in results["scopes"][1] and "strength: share of the median norm," in main_table(results["scopes"][1]).note
    old, = (f for name, f in figures(results) if name == "toy, toy, strength")
    assert old.get_supxlabel() == "strength, share of the median norm (dotted: chosen)"
    s = Study(tmp_path).base().method("iti", .1)  # in shares
    for method, unit in ("caa", "spread"), ("odesteer", "spread"), ("repe", "T"):
        for x in .5, 1.: s.run("steer", method, {}, 1, {unit: x}, "val", effect=x)
        s.choice(method, strength={unit: 1.})
        s.run("steer", method, {}, 1, {unit: 1.}, effect=1.)
    found = json.loads(json.dumps(quick(tmp_path)))
    scope = as_results(found)["scopes"][0]
    assert scope["units"] == {"caa": "spread", "odesteer": "spread", "repe": "T"}
    table = main_table(scope)
    strengths = {row[0]: row[table.columns.index("strength")] for row in table.cells()}
    assert (strengths["caa"], strengths["repe"], strengths["iti"]) == ("1", "T 1", "share 0.4") and "strength: multiple of the spread," in table.note
    figure = strength_figure(scope)
    assert {ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()} == {"caa", "odesteer", "repe, time T", "iti, share of the median norm"}
    assert figure.get_supxlabel() == "strength, multiple of the spread (dotted: chosen)" and all(ax.get_xscale() == "linear" for ax in figure.axes)


def test_controllers_stand_beside_steerers_with_their_own_strengths_and_their_effort(tmp_path):
    s = Study(tmp_path/"runs").base().method("caa", .3, more={"effort": .05})
    for T in (1., 4.): s.run("steer", "alqr", {}, None, {"T": T}, "val", effect=T/10)
    s.choice("alqr", layer=None, strength={"T": 4.}, layers=(None,))
    for seed in range(3): s.run("steer", "alqr", {}, None, {"T": 4.}, effect=.4, seed=seed, more={"moved": None, "angle": None, "effort": .1 + .01*seed})
    found = quick(tmp_path/"runs")
    scope, = found["scopes"]
    table = main_table(scope)
    cells = {row[0]: dict(zip(table.columns, row)) for row in table.cells()}
    assert (cells["alqr"]["layer"], cells["alqr"]["strength"], cells["alqr"]["effort"]) == ("all", "T 4", "0.110") and (cells["caa"]["layer"], cells["caa"]["strength"], cells["caa"]["effort"]) == ("1", "0.4", "0.050")
    assert cells["unsteered"]["effort"] == "" and "effort" in table.note and "set-point" in table.note
    assert "effort" not in main_table(quick(Study(tmp_path/"old").base().method("caa", .3).out)["scopes"][0]).columns
    drawn = dict(figures(found))
    panels = {ax.get_title(loc="left"): ax for ax in drawn["toy, toy, strength"].axes}
    assert panels["alqr, set-point"].get_xlim()[1] > 4 and panels["caa"].get_xlim()[1] < 1 and "set-point" in drawn["toy, toy, strength"].get_supxlabel()
    assert [t.get_text() for t in drawn["toy, toy, layers"].axes[0].get_yticklabels()] == ["caa"]  # a controller has no layer to choose
    report(found, tmp_path/"r")
    assert "| alqr |" in (tmp_path/"r"/"report.md").read_text()


def test_no_name_in_a_figure_covers_another(results):
    "Nineteen methods at nearly the same place, and the scopes of a study"
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.text import Text
    from odesteer import plots
    from odesteer.report import pareto_figure
    from odesteer.results import committed
    def boxes(notes):
        notes[0].figure.canvas.draw()
        return [Text.get_window_extent(note).extents for note in notes]
    def overlaps(boxes): return [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]
    rng = np.random.default_rng(0)
    fig, ax = plt.subplots(figsize=(7, 4))
    ax.set(xlim=(-1, 1), ylim=(-1, 1))
    points = .08*rng.normal(size=(19, 2))
    notes = plots.label_points(ax, points, [f"method {i}" for i in range(19)])
    assert [n.get_text() for n in notes] == [f"method {i}" for i in range(19)] and not overlaps(boxes(notes))
    inside = ax.get_window_extent().extents
    assert all(b[0] >= inside[0] and b[1] >= inside[1] and b[2] <= inside[2] and b[3] <= inside[3] for b in boxes(notes))
    plt.close(fig)
    for scope in [*results["scopes"][:1], *(s for s in committed()["scopes"] if not s["part"])]:
        figure = pareto_figure(scope)
        named = sum(r["off"] != len(r["chosen"]) for r in scope["rows"])
        for ax in figure.axes: assert len(ax.texts) == named and not overlaps(boxes(ax.texts)), (scope["task"], ax.get_xlabel())
        plt.close(figure)


def test_pictures_of_a_report_are_sharp(results, tmp_path):
    from PIL import Image
    report(results, tmp_path)
    pictures = [Image.open(path) for path in (tmp_path/"figures").iterdir()]
    assert pictures and all(p.width > 800 for p in pictures) and all(path.stat().st_size < 150_000 for path in (tmp_path/"figures").iterdir())
    text = (tmp_path/"report.md").read_text()
    assert all(len(alt) > 30 for alt in re.findall(r"^!\[(.*)\]\(figures", text, flags=re.M))

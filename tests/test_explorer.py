"The explorer without a browser: its numbers against the steerers' own, what it keeps, and its sliders moved as a front end moves them"
import asyncio
import base64
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import odesteer as ods
from odesteer import explorer
from odesteer.data import ContrastTexts
from odesteer.explorer import MOST_STEPS, SPINNER, STRONGEST, Explorer, State, caption, explore, find_plane, follow, knobs, prompt_of, said
from odesteer.ode import integrate
from odesteer.tasks import micro_task

from .archs import tiny_model, tiny_tokenizer
from .project import ROOT, cells

METHODS = (*ods.steerer_names(), "random")


@pytest.fixture(scope="module")
def lm(): return ods.load_micro()


@pytest.fixture(scope="module")
def lab(lm): return explore("truth", lm, limit=400)


@pytest.fixture
def fresh(lab):
    "An explorer of its own, with what the shared one has read and fitted"
    kept = {kind: dict(lab.scene.kept.get(kind, {})) for kind in ("rows", "fitted")}
    return Explorer(replace(lab.scene, kept=kept), State(), rest=.1)


def start(lab, layer=1, n=12):
    neg = lab.scene.acts(layer)[1]
    return neg[torch.linspace(0, len(neg) - 1, n).long()]


def fitted(lab, layer=1, **kw): return ods.ODESteer(**kw).fit(*lab.scene.acts(layer))


# The plane

def test_plane_holds_means_and_first_principal_direction(lab):
    pos, neg = lab.scene.acts(1)
    plane = lab.scene.plane(1)
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2), atol=1e-5, rtol=0)
    for mean in (pos.mean(0), neg.mean(0)): torch.testing.assert_close(plane.leave(plane.enter(mean)), mean, atol=1e-3, rtol=1e-4)
    X = torch.cat([pos, neg]).double().numpy()
    first = torch.tensor(np.linalg.svd(X - X.mean(0), full_matrices=False)[2][0]).float()
    assert (plane.axes @ first).norm() > .9999
    half = (pos.mean(0) - neg.mean(0)).norm() / 2 / plane.unit
    torch.testing.assert_close(plane.enter(pos.mean(0)), torch.tensor([half, 0.]), atol=1e-4, rtol=0)
    torch.testing.assert_close(plane.enter(neg.mean(0)), torch.tensor([-half, 0.]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("gap", [0.05, 1., 50.])
def test_plane_where_the_principal_direction_is_that_of_the_means(gap):
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 6, generator=g) * torch.tensor([.1, 2., 1., .1, .1, .1])
    shift = torch.tensor([gap, 0, 0, 0, 0, 0])
    plane = find_plane(noise[:100] + shift, noise[100:] - shift, 1.)
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2), atol=1e-5, rtol=0)
    if gap == 50.: assert plane.axes[0, 0] > .99 and abs(plane.axes[1, 1]) > .9  # up is the second direction


def test_points_of_the_plane_come_back(lab):
    xy = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(0))
    plane = lab.scene.plane(2)
    torch.testing.assert_close(plane.enter(plane.leave(xy)), xy, atol=1e-4, rtol=0)


# The flow against the steerers' own numbers

@pytest.mark.parametrize("metric", ["euclidean", "covariance"])
@pytest.mark.parametrize("steps", [1, 3, 10, 20])
def test_flow_is_the_trajectory(lab, steps, metric):
    state = State(spread=1.3, steps=steps, metric=metric)
    flow, a, steerer = lab.scene.flow(state), start(lab), fitted(lab, steps=steps, metric=metric)
    path = steerer.trajectory(a, spread=1.3)
    torch.testing.assert_close(flow.xy, lab.scene.plane(1).enter(path), atol=5e-3, rtol=0)
    euler = integrate(steerer.vector_field, a, 1.3 * steerer.spread_.item(), steps, path=True)
    torch.testing.assert_close(flow.xy, lab.scene.plane(1).enter(euler), atol=5e-3, rtol=0)
    assert len(flow.h) == len(flow.T) >= 41 and flow.T[0] == 0 and flow.T[-1] == torch.tensor(1.3)
    between = (len(flow.h) - 1) // steps
    torch.testing.assert_close(flow.h[::between], steerer.barrier.value(path), atol=2e-2, rtol=0)
    for m in (1, between // 2, len(flow.h) - 2):  # by hand: a point of the straight piece it lies on
        k, part = divmod(m, between)
        point = path[k] + part / between * (path[min(k + 1, steps)] - path[k])
        torch.testing.assert_close(flow.h[m], steerer.barrier.value(point), atol=2e-2, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_flow_of_every_method_ends_where_it_steers(lab, method):
    state, a = State(method, spread=.7), start(lab)
    flow, end = lab.scene.flow(state), lab.scene.steerer(state).steer(a, spread=.7)
    plane, h = lab.scene.plane(1), lab.scene.barrier(1).value
    torch.testing.assert_close(flow.xy[0], plane.enter(a), atol=1e-4, rtol=0)
    torch.testing.assert_close(flow.xy[-1], plane.enter(end), atol=5e-3, rtol=0)
    torch.testing.assert_close(flow.h[[0, -1]], torch.stack([h(a), h(end)]), atol=2e-2, rtol=0)
    assert knobs(ods.euler.load_class(method)) == {"odesteer": ("steps", "metric"), "step-odesteer": ("metric",)}.get(method, ())


def test_a_path_of_other_solvers_has_their_states(lab):
    for solver in ("rk4", "dopri5"):
        s = fitted(lab, solver=solver, steps=4)
        states, way = follow(s, start(lab), 1.)
        torch.testing.assert_close(states, s.trajectory(start(lab), spread=1.))
        torch.testing.assert_close(way[::10], states)


def test_levels_hold_the_middle_of_each_class(lab):
    for layer in lab.scene.layers:
        for (lower, upper), a in zip(lab.scene.levels(layer).values(), lab.scene.acts(layer)):
            h = fitted(lab, layer).barrier.value(a).numpy()
            np.testing.assert_allclose([lower, upper], np.quantile(h, [.1, .9]), atol=1e-3)


def test_one_step_overshoots_where_the_barrier_is_curved(lm):
    lab = explore("truth", lm, layer=3, spread=STRONGEST, steps=1, gamma=10., n_components=2000)
    way = lab.flow.h.median(1).values
    lab.set(steps=10)
    assert way.argmax() < len(way) - 10 and way[-1] < way.max() - 3 and lab.flow.h[-1].median() > way.max()


# What is kept

def test_dragging_fits_and_asks_once(fresh, monkeypatch):
    fits, asked = [], []
    fit, ask = explorer.fit_on, ods.generate_text
    monkeypatch.setattr(explorer, "fit_on", lambda acts, texts, method, **kw: fits.append((method, kw)) or fit(acts, texts, method, **kw))
    monkeypatch.setattr(ods, "generate_text", lambda *a, **kw: asked.append(1) or ask(*a, **kw), raising=False)
    fresh.scene.kept["fitted"] = {}
    for _ in range(2):
        for steps in (1, 5, 10): fresh.set(steps=steps), fresh.flow, fresh.answers
        for spread in (.2, 1.): fresh.set(method="caa", spread=spread, steps=steps), fresh.flow, fresh.answers
        fresh.set(method="caa", metric="covariance"), fresh.flow, fresh.answers
        fresh.set(method="odesteer", metric="euclidean", spread=.5)
    assert fits == [("odesteer", {"metric": "euclidean"}), ("caa", {})] and len(asked) == 5
    fresh.set(metric="covariance"), fresh.flow
    assert fits[2:] == [("odesteer", {"metric": "covariance"})]


def test_memory_is_bounded(fresh):
    for spread in np.linspace(0, 4, 400): fresh.scene.keep("flow", spread, object)
    assert len(fresh.scene.kept["flow"]) == 300 and 4. in fresh.scene.kept["flow"] and 0. not in fresh.scene.kept["flow"]


def test_a_failure_is_not_kept(fresh):
    with pytest.raises(ZeroDivisionError): fresh.scene.keep("x", 1, lambda: 1 / 0)
    assert fresh.scene.keep("x", 1, lambda: 2) == 2


# Answers

@pytest.mark.parametrize("state", [State(), State(spread=2., steps=3), State("caa", layer=2), State(metric="covariance", spread=1.)], ids=str)
def test_answers_are_those_of_steering(lab, lm, state):
    s = lab.scene
    acts = s.acts(state.layer)
    steerer = fitted(lab, state.layer, steps=state.steps, metric=state.metric) if state.method == "odesteer" else ods.CAA().fit(*acts)
    with ods.steering(lm.model, steerer, layer=state.layer, spread=state.spread):
        by_hand = ods.generate_text(lm.model, lm.tokenizer, s.prompts, do_sample=False, max_new_tokens=32)
    assert s.answers(state) == by_hand != s.answers()
    assert s.answers() == ods.generate_text(lm.model, lm.tokenizer, s.prompts, do_sample=False, max_new_tokens=32), "no hook is left"


def test_no_strength_is_plain(lab):
    for method in ("odesteer", "caa"): assert lab.scene.answers(State(method, spread=0.)) is lab.scene.answers()


def test_marks_are_the_judges(lab, lm):
    task = micro_task(lm, "truth")
    test = task.folds[0].test
    prompts = [test[i * len(test) // 3] for i in range(3)]
    assert [p.text for p in prompts] == lab.scene.prompts
    judged = task.judge(prompts, lab.scene.answers(State()))
    assert lab.scene.marks(State()) == {k: list(judged[k]) for k in ("true_info", "info", "wellformed")}


# What may be explored

def test_own_texts_and_another_model():
    model, tok = tiny_model("llama"), tiny_tokenizer()
    texts = ContrastTexts(["the fish is red", "a bird is wise", "the fish is wise"], ["the fish is a rock", "a bird is a rock", "rock"], [0, 1, 2], [0, 1, 2])
    lab = explore(texts, (model, tok), prompts=["the fish", "a bird"], methods=("caa", "odesteer"), n_components=200)
    assert lab.scene.layers == tuple(range(len(ods.decoder_layers(model)))) and lab.scene.marks() == {} and len(lab.answers) == 2
    lab.set(method="caa", layer=0)
    pos, neg = (ods.collect_activations(model, tok, t, [0], progress=False)[0] for t in (texts.pos, texts.neg))
    torch.testing.assert_close(lab.flow.xy[-1], lab.scene.plane(0).enter(ods.CAA().fit(pos, neg).steer(start(lab, 0), spread=.5)), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="prompts="): explore(texts, (model, tok))
    assert explore(texts, (model, tok), prompts="the fish").scene.prompts == ["the fish"]


def test_a_fitted_steerer_is_looked_at_as_it_is(lm, lab):
    mine = fitted(lab, 2, steps=4, gamma=1., n_components=500)
    mine.about["layer"] = 2
    own = explore(mine, lm, limit=400)
    assert own.state == State(layer=2, steps=4) and own.scene.methods == ("odesteer",) and own.scene.layers == (2,)
    h = mine.barrier.value(mine.trajectory(start(own, 2), spread=.5))
    torch.testing.assert_close(own.flow.h[::10], h, atol=1e-2, rtol=0)
    own.set(steps=9)
    assert mine.steps == 4 and len(own.flow.xy) == 10
    with ods.steering(lm.model, ods.ODESteer(steps=9, gamma=1., n_components=500).fit(*own.scene.acts(2)), layer=2, spread=.5):
        by_hand = ods.generate_text(lm.model, lm.tokenizer, own.scene.prompts, do_sample=False, max_new_tokens=32)
    assert own.answers == by_hand
    caa = ods.CAA().fit(*lab.scene.acts(1))
    with pytest.raises(ValueError, match="say which block"): explore(caa, lm)
    with pytest.raises(ValueError, match="say which block"): explore(caa, lm, layer=4)
    with pytest.raises(RuntimeError, match="not fitted"): explore(ods.CAA(), lm, layer=1)
    assert explore(caa, lm, layer=1).state == State("caa")


def test_places_of_reading(lm):
    task = micro_task(lm, "toxicity")
    for reading in ("mean", "all"):
        task.reading = reading
        lab = explore(task, lm, limit=60)
        pos, neg = lab.scene.acts(1)
        assert pos.ndim == neg.ndim == 2 and (len(pos) > len(lab.scene.texts.pos)) == (reading == "all")
        assert lab.flow.h.shape == (41, 12) and len(lab.answers) == 3


@pytest.mark.parametrize("kw, says", [
    (dict(what="style"), "'style' is no task of the micro model: .*truth, toxicity, helpfulness"), (dict(step=3), "step: neither a slider"), (dict(gamma=-1.), "gamma must be"),
    (dict(methods=("alqr",)), "alqr cannot be explored"), (dict(methods=("caaa",)), "caaa cannot be explored"), (dict(layer=4), "layer must be one of 0, 1, 2, 3"),
    (dict(spread=9.), "spread .* from 0 to 4"), (dict(method="caaa"), "method must be one of caa, ")], ids=str)
def test_what_cannot_be_explored_is_said(lm, kw, says):
    with pytest.raises(ValueError, match=says) as e: explore(**{"what": "truth", "model": lm} | kw)
    assert "\n" not in str(e.value)


def test_tasks_that_need_files_say_so():
    with pytest.raises(ValueError, match="needs path.*page 16"): explore("concept", (tiny_model("llama"), tiny_tokenizer()))


@pytest.mark.parametrize("bad", [dict(spread=-.1), dict(spread=float("nan")), dict(spread="1"), dict(spread=True), dict(steps=0), dict(steps=MOST_STEPS + 1), dict(steps=2.), dict(layer=-1),
                                 dict(metric="l1"), dict(method=None), dict(T=1.)], ids=str)
def test_a_place_that_no_slider_has_is_refused_and_changes_nothing(fresh, bad):
    with pytest.raises(ValueError) as e: fresh.set(**bad)
    assert "\n" not in str(e.value) and fresh.state == State() and (list(bad)[0] in str(e.value))


# The sliders

async def rested(ex):
    "Until the work is done: a busy machine takes longer"
    for _ in range(300):
        await asyncio.sleep(.1)
        if not ex.views["busy"].value: return


def drag(ex, places, name="spread", pause=.01):
    "Move a slider as a front end does, inside an event loop; what was drawn, and whether the spinner turned meanwhile"
    drawn = []
    async def hand():
        ex.views["way"].observe(lambda change: drawn.append(getattr(ex.state, name)), "value")
        for place in places:
            ex.controls[name].set_state({"value": place})
            await asyncio.sleep(pause)
        busy = ex.views["busy"].value
        await rested(ex)
        return busy
    return asyncio.run(hand()), drawn


def test_a_drag_is_answered_once_when_it_rests(fresh):
    fresh.panel
    before = {name: view.value for name, view in fresh.views.items()}
    busy, drawn = drag(fresh, [.6 + .1 * k for k in range(12)])
    assert busy == SPINNER and fresh.views["busy"].value == "" and drawn == pytest.approx([1.7])
    assert all(bytes(fresh.views[name].value) != bytes(before[name]) for name in ("flow", "way")) and fresh.views["answers"].value != before["answers"]
    assert fresh.views["answers"].value == fresh.scene.table(State(spread=fresh.state.spread))


def test_it_rests_in_the_middle_of_a_drag(fresh):
    fresh.panel
    async def hand():
        for place in (.6, .8):
            fresh.controls["spread"].set_state({"value": place})
            await rested(fresh)
            assert fresh.views["answers"].value == fresh.scene.table(State(spread=place))
    asyncio.run(hand())


def test_a_newer_move_ends_the_work_on_an_older_one(fresh, monkeypatch):
    fresh.panel
    told, table = [], type(fresh.scene).table
    monkeypatch.setattr(type(fresh.scene), "table", lambda self, state: told.append(state.spread) or table(self, state))
    async def hand():
        fresh.views["way"].observe(lambda change: len(told) or fresh.controls["spread"].set_state({"value": 2.}), "value")  # while the pictures of 1 are drawn
        fresh.controls["spread"].set_state({"value": 1.})
        await rested(fresh)
    asyncio.run(hand())
    assert told == [2.] and fresh.state.spread == 2.


@pytest.mark.parametrize("name, place", [("method", "caa"), ("steps", 3), ("layer", 2), ("metric", "covariance")])
def test_every_slider_and_menu_moves_the_views(fresh, name, place):
    fresh.panel
    control, before = fresh.controls[name], bytes(fresh.views["flow"].value)
    if name != "steps": place = [str(option) for option in control.options].index(str(place))
    drag(fresh, [place], name) if name == "steps" else asyncio.run(choose(fresh, name, place))
    assert getattr(fresh.state, name) == control.value != getattr(State(), name) and bytes(fresh.views["flow"].value) != before and fresh.error == ""


async def choose(ex, name, index):
    ex.controls[name].set_state({"index": index})  # front ends send the place in the menu
    await rested(ex)


def test_sliders_that_a_method_does_not_hear_are_grey(fresh):
    fresh.panel
    def grey(): return [name for name, c in fresh.controls.items() if c.disabled]
    for method, expected in (("caa", ["steps", "metric"]), ("step-odesteer", ["steps"]), ("odesteer", [])):
        asyncio.run(choose(fresh, "method", METHODS.index(method)))
        assert grey() == expected and fresh.state.method == method
    fresh.set(method="iti")
    assert grey() == ["steps", "metric"]


def test_a_program_moves_the_sliders_too_and_is_answered_at_once(fresh):
    fresh.panel
    before = bytes(fresh.views["flow"].value)
    fresh.set(spread=2., method="caa")
    assert bytes(fresh.views["flow"].value) != before and fresh.controls["spread"].value == 2. and fresh.controls["method"].value == "caa"
    fresh.controls["spread"].value = .5  # a plain program has no event loop
    assert fresh.state == State("caa") and fresh.views["busy"].value == "" and fresh.views["answers"].value == fresh.scene.table(State("caa"))


# What goes wrong

def test_an_error_is_said_in_the_panel_and_the_next_move_works(fresh, capsys):
    def judge(answers):
        if answers == fresh.scene.answers(State(spread=2.)): raise RuntimeError("no <b>mark</b> for this")
        return {}
    ex = Explorer(replace(fresh.scene, judge=judge, kept={}), State(), rest=.05)
    ex.panel
    drag(ex, [2.])
    assert ex.error == "RuntimeError: no <b>mark</b> for this" and "&lt;b&gt;mark" in ex.views["error"].value and "<b>" not in ex.views["error"].value
    assert ex.views["answers"].layout.visibility == "hidden" and ex.views["busy"].value == ""
    drag(ex, [1.])
    assert ex.error == "" == ex.views["error"].value and ex.views["answers"].layout.visibility == "visible"
    assert capsys.readouterr() == ("", "")


def test_a_fit_that_fails_is_said(fresh):
    texts = fresh.scene.texts
    uneven = ContrastTexts(texts.pos[:20], texts.neg[:12], [f"a{i}" for i in range(20)], [f"b{i}" for i in range(12)])
    ex = Explorer(replace(fresh.scene, texts=uneven, kept={}), State())
    ex.panel
    assert ex.error == ""
    ex.set(method="repe")
    assert "ValueError: this method compares pairs" in ex.views["error"].value and ex.views["flow"].layout.visibility == "hidden"
    ex.set(method="caa")
    assert ex.error == "" and ex.views["flow"].layout.visibility == "visible"


def test_a_warning_is_said_too(fresh, recwarn):
    def judge(answers):
        warnings.warn("a judge has doubts")
        return {}
    ex = Explorer(replace(fresh.scene, judge=judge, kept={}), State())
    ex.panel
    assert "a judge has doubts" in ex.views["error"].value and ex.error == "" and not [w for w in recwarn if "doubts" in str(w.message)]


# What is shown

@pytest.mark.parametrize("who", ["terminal", "page", "reader"])
def test_each_audience_gets_its_own(fresh, monkeypatch, who):
    monkeypatch.setattr(explorer, "audience", lambda: who)
    bundle = fresh._repr_mimebundle_()
    json.dumps(bundle)  # a notebook with it can be saved
    assert ("application/vnd.jupyter.widget-view+json" in bundle) == (who == "reader") and ("image/png" in bundle) == (who != "terminal") and bundle["text/plain"]
    if who != "terminal": assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")


def test_here_is_no_reader(): assert explorer.audience() == "terminal"


def test_snapshot_has_a_column_for_each_state(fresh):
    import matplotlib.pyplot as plt
    fig = fresh.snapshot(dict(spread=.5), dict(spread=2., method="caa"), prompt=1)
    flows, ways, texts = np.array(fig.axes).reshape(3, 2)
    assert not plt.get_fignums() and [ax.get_title(loc="left") for ax in flows] == ["odesteer, 0.5 spreads", "caa, 2 spreads"]
    assert flows[0].get_xlim() == flows[1].get_xlim() and ways[0].get_ylim() == ways[1].get_ylim()
    for ax, state in zip(ways, (State(), State("caa", spread=2.))):
        flow = fresh.scene.flow(state)
        thin = [line.get_ydata() for line in ax.lines if len(line.get_xdata()) == len(flow.T)]
        np.testing.assert_allclose(np.stack(thin[:12], 1), flow.h.numpy(), rtol=1e-6)
        np.testing.assert_allclose(thin[12], flow.h.median(1).values.numpy(), rtol=1e-6)
    shown = [ax.texts[0].get_text().replace("\n", " ") for ax in texts]
    assert all(text.startswith(fresh.scene.answers(s)[1].strip()[:30]) for text, s in zip(shown, (State(), State("caa", spread=2.))))
    with pytest.raises(ValueError, match="spread"): fresh.snapshot(dict(spread=5.))


def test_the_contour_is_the_barrier_in_the_plane(fresh):
    import matplotlib.pyplot as plt
    from odesteer.plots import plane_grid
    fig, ax = plt.subplots()
    fresh.scene.draw_flow(ax, State(), 1.5)
    plt.close(fig)
    h = fresh.scene.kept["grid"][1, 1.5]
    torch.testing.assert_close(h, fresh.scene.barrier(1).value(fresh.scene.plane(1).leave(plane_grid(1.5, 61))))


def test_texts_are_shown_as_texts(fresh):
    evil = replace(fresh.scene, prompts=["<script>alert(1)</script>"], kept={"answers": {None: ["a & b"], State(): ["$x_$ </table>\n"]}}, judge=None)
    html = evil.table(State())
    assert "<script" not in html and "a &amp; b" in html and "&lt;/table&gt;" in html
    evil.kept |= {kind: fresh.scene.kept[kind] for kind in ("rows", "fitted")}
    evil.snapshot([State()]).savefig("/dev/null", format="png")  # dollars are no formula
    assert said("", {"a": float("nan")}) == ("(nothing)", "") and prompt_of([{"role": "user", "content": "who\nis it?"}]) == "who is it?"
    assert caption(State(steps=1), [State(steps=1), State()]) == "1 step" and caption(State(), [State()]) == "0.5 spreads"


def test_widgets_are_imported_when_they_are_looked_at():
    out = subprocess.run([sys.executable, "-c", """
import sys, odesteer as ods
lab = ods.explore("toxicity", limit=40, n_components=200)
lab.set(spread=1.); lab.flow; lab.answers
print("ipywidgets" in sys.modules, "matplotlib" in sys.modules)
lab.panel
print("ipywidgets" in sys.modules)"""], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert out.split() == ["False", "False", "True"]


# In a notebook

def run(sources, reader=False):
    "Outputs of cells that a kernel has run, for a page or for a reader"
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_start_new_kernel_client(self, **kwargs):
            kc = await super().async_start_new_kernel_client(**kwargs)
            kc.allow_stdin = reader
            return kc
        start_new_kernel_client = None
    from jupyter_core.utils import run_sync
    Client.start_new_kernel_client = run_sync(Client.async_start_new_kernel_client)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    Client(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return [cell["outputs"] for cell in nb.cells]


CELLS = ["import asyncio, odesteer as ods\nlab = ods.explore('truth', limit=200, spread=.5)\nlab",
         "lab.panel\nbefore = {k: v.value for k, v in lab.views.items()}\nfor k in range(10):\n    lab.controls['spread'].set_state({'value': .6 + .1*k})\n    await asyncio.sleep(.02)\nprint('svg' in lab.views['busy'].value)",
         "while lab.views['busy'].value: await asyncio.sleep(.1)\nprint(lab.state.spread, [k for k in before if lab.views[k].value != before[k]], lab.error)",
         "lab.set(steps=1, spread=2.)\nprint(lab.controls['steps'].value, lab.answers == lab.scene.answers(ods.explorer.State(spread=2., steps=1)))"]


@pytest.mark.parametrize("reader", [False, True], ids=["page", "reader"])
def test_values_set_in_a_notebook_change_what_is_shown(reader):
    shown, busy, moved, program = run(CELLS, reader)
    kinds = shown[0]["data"].keys()
    assert ("application/vnd.jupyter.widget-view+json" in kinds) == reader and {"image/png", "text/plain"} <= kinds and len(shown) == 1
    assert [o["text"].strip() for o in (*busy, *moved, *program)] == ["True", "1.5 ['flow', 'way', 'answers']", "1 True"]


def test_the_page_keeps_no_widget():
    page = ROOT/"nbs"/"24_explorer.ipynb"
    assert "widgets" not in json.loads(page.read_text())["metadata"]
    opening = next(c for c in cells(page, "code") if c["source"].endswith("\nlab") and c["outputs"])
    assert "image/png" in opening["outputs"][0]["data"]

"""Page 30: the same comparison on many workers, one of which dies; one model on many devices"""
import pytest

from odesteer.plans import run_bench
from odesteer.scale import read_attempts

from .benches import contents


def test_a_killed_raylet_changes_nothing(tmp_path):
    "Two raylets, one killed in the middle of a run: the same results, none lost, none twice"
    pytest.importorskip("ray")
    from . import cluster
    alone, shared = tmp_path/"alone", tmp_path/"shared"
    run_bench(cluster.options(alone))
    name, when = cluster.disturbed(shared)
    assert contents(alone) == contents(shared) and len(contents(alone)) > 8
    def choices(out): return {p.name: p.read_text() for p in (out/"choices").glob("*.json")}
    assert choices(alone) == choices(shared)
    attempts = read_attempts(shared)
    begun = [(key, end) for a in attempts for key, _, end in a.runs]
    made = [key for key, end in begun if end is not None]
    assert sorted(made) == sorted(contents(alone)), "each run was made once"
    lost = [(a, key) for a in attempts for key, _, end in a.runs if end is None]
    assert [(a.worker, a.end, key in made) for a, key in lost] == [(name, None, True)], "the run of the dead worker was made again"
    assert {a.worker for a in attempts if a.begun > when} == {a.worker for a in attempts} - {name}

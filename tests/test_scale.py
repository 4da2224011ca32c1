"""Page 30: the same comparison on many workers, one of which dies; one model on many devices"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from odesteer.plans import run_bench
from odesteer.scale import read_attempts

from .archs import tiny_model, tiny_tokenizer
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


@pytest.mark.parametrize("arch", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.skipif("ODESTEER_RANKS" not in os.environ, reason="set ODESTEER_RANKS=1 for more architectures")), pytest.param("gemma2", marks=pytest.mark.skipif("ODESTEER_RANKS" not in os.environ, reason="set ODESTEER_RANKS=1"))])
def test_two_processes_share_a_model(arch, tmp_path):
    "A tensor-parallel plan of transformers gives what one process gives; what is split otherwise is refused"
    tiny_model(arch).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(__file__).with_name("ranks.py")), str(tmp_path), arch]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split("\n"))[-2:] == ["rank 0 fine", "rank 1 fine"], done.stdout

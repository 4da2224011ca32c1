"Small benches of the micro world, and what their folders hold"
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from odesteer.data import ContrastTexts
from odesteer.runs import Bench, Run
from odesteer.tasks import Fold, micro_task


def small(lm, axis="truth", n=6, **changes):
    "A task of the micro world with few prompts"
    task = micro_task(lm, axis)
    fold, = task.folds
    rows = slice(0, 60)
    texts = ContrastTexts(fold.texts.pos[rows], fold.texts.neg[rows], fold.texts.pos_groups[rows], fold.texts.neg_groups[rows])
    few = dict(folds=[Fold(texts, fold.val[:n], fold.test[:n])], decoding=task.decoding | {"max_new_tokens": 8}, data=task.data | {"n": n})
    return replace(task, **few | changes)


def bench(lm, out, batch_size=4, deadline=math.inf, on_run=lambda run: None, **changes):
    return Bench(lm.model, lm.tokenizer, small(lm, **changes), out, "micro", batch_size=batch_size, deadline=deadline, on_run=on_run)


def contents(out):
    "What the finished runs of a folder hold, without times"
    return {p.parent.name: ((p.parent/"scores.json").read_text(), [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in open(p.parent/"answers.jsonl")]) for p in Path(out).glob("*/summary.json")}


def fake(n=100, **rates):
    return Run("", {}, {m: np.repeat([1., 0.], [round(r*n), n - round(r*n)]) for m, r in rates.items()}, [*range(n)], {})

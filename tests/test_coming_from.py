"The lines of other libraries on the page for those who come from them: run where the library is installed, beside ours on the same model"
import contextlib
import io
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import odesteer as ods

from .project import ROOT, cells

PAGE = ROOT/"nbs"/"coming_from.ipynb"


def lines_of(library: str) -> str:
    "The block of code on the page that imports a library"
    blocks = re.findall(r"^```python\n(.*?)^```", "\n".join(c["source"] for c in cells(PAGE, "markdown")), flags=re.M | re.S)
    found, = [block for block in blocks if f"from {library} import" in block]
    return found


@pytest.fixture
def space():
    "What the page has made before those lines"
    lm = ods.load_micro()
    texts = lm.world.contrast("toxicity")
    pairs = list(zip(texts.pos[:32], texts.neg[:32]))
    prompt = lm.world.prompts("toxicity", "test")[0].text

    def answer():
        ids = lm.tokenizer(prompt, return_tensors="pt")
        return lm.tokenizer.decode(lm.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1]:])
    acts = ods.collect_activations(lm.model, lm.tokenizer, [text for pair in pairs for text in pair], layers=[1], progress=False)[1]
    return dict(model=lm.model, tokenizer=lm.tokenizer, pairs=pairs, layer=1, answer=answer, pos=acts[::2], neg=acts[1::2])


@pytest.mark.skipif(not find_spec("steering_vectors"), reason="steering-vectors is not installed")
def test_steering_vectors_gives_the_same_vector_and_answer(space):
    exec(lines_of("steering_vectors"), space)
    caa = ods.CAA().fit(space["pos"], space["neg"])
    torch.testing.assert_close(space["vector"].layer_activations[1], caa.vector_field(space["pos"][0]), atol=1e-4, rtol=1e-4)
    plain = space["answer"]()
    with ods.steering(space["model"], caa, layer=1, T=1., positions="all"): assert space["answer"]() == space["theirs"] != plain


@pytest.mark.skipif(not find_spec("repeng") or not hasattr(np, "float_"), reason="repeng 0.4.0 is not installed, or NumPy 2 is, which it does not know")
def test_repeng_gives_the_same_direction_and_answer(space):
    with contextlib.redirect_stderr(io.StringIO()): exec(lines_of("repeng"), space)
    rows = torch.arange(len(space["pairs"]))
    repe = ods.RepE(variant="paper-table").fit(space["pos"], space["neg"], pairs=torch.stack([rows, rows], 1))
    cosine = torch.cosine_similarity(torch.as_tensor(space["control"].directions[1]).float(), repe.vector_field(space["pos"][0]), dim=0)
    assert cosine > .999
    space["wrapped"].unwrap()
    with ods.steering(space["model"], repe, layer=1, T=4., positions="all"): assert space["answer"]() == space["theirs"]

"""One model on two processes, as `torch.distributed.run --nproc-per-node 2 tests/ranks.py FOLDER ARCH` starts them: the same as on one

FOLDER holds a small model with its tokenizer; `tests/test_scale.py` runs this.
"""
import sys
import warnings
from pathlib import Path

import torch
import transformers
from torch.distributed import get_rank
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import odesteer as ods  # noqa: E402
from odesteer.models import fingerprint, is_split  # noqa: E402
from tests.benches import small  # noqa: E402

POS, NEG = ([(f"q: {c} a:", f" {word} {c}") for c in "abcdefgh"] for word in ("yes good", "no bad"))
PROMPTS, PASSAGES = ["hello", "a longer prompt", "x"], list(zip(*POS))


def load(folder, **plan):
    split = {"distributed_config": DistributedConfig(**plan)} if plan else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **split).eval()


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def refused(f, *words):
    try: f()
    except ValueError as e: assert all(w in str(e) for w in words), e
    else: raise AssertionError(f"not refused: {words}")


def same(one, two, tokenizer, folder):
    assert is_split(two) and not is_split(one) and fingerprint(one) == fingerprint(two)
    def read(m, **kw): return ods.collect_activations(m, tokenizer, POS + NEG, layers=[2], progress=False, **kw)[2]
    acts, cache = read(one), Path(folder)/"cache"
    close(read(two), acts)
    for _ in range(2): close(read(two, cache_dir=cache), acts)
    assert read(one, cache_dir=cache).equal(read(two, cache_dir=cache)), "one cache for both"
    def steered(m, obj, **how):
        with ods.steering(m, obj, T=1., **how):
            return ods.generate_text(m, tokenizer, PROMPTS, max_new_tokens=8), ods.score_continuations(m, tokenizer, *PASSAGES)
    def equal(a, b):
        assert a[0] == b[0]
        close(a[1], b[1])
    plain = ods.generate_text(one, tokenizer, PROMPTS, max_new_tokens=8)
    for method in ("caa", "odesteer", "hpr"):
        steerer = ods.make_steerer(method).fit(acts[:8], acts[8:])
        equal(steered(one, steerer, layer=2), steered(two, steerer, layer=2))
        assert steered(one, steerer, layer=2)[0] != plain or method != "caa"
    def drawn(m): return ods.generate_text(m, tokenizer, PROMPTS, seed=1, do_sample=True, max_new_tokens=8)
    assert drawn(one) == drawn(two)
    for method, given in (("alqr", {"n_jacobian": 2}), ("alqr-feature", {"n_jacobian": 1}), ("spid", {})):
        def fit(m): return ods.make_steerer(method, **given).fit(m, tokenizer, POS, NEG, progress=False)
        ours, theirs = fit(one), fit(two)
        equal(steered(one, ours), steered(one, theirs))
        equal(steered(one, ours), steered(two, ours))


def main(folder, arch):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    one, two = load(folder), load(folder, tp_plan="auto")
    same(one, two, tokenizer, folder)
    if arch != "llama": return
    from odesteer.runs import Bench
    refused(lambda: Bench(two, tokenizer, small(ods.load_micro())), "several processes", "device_map='auto'")
    for other in (load(folder, fsdp_size=2), load(folder, pp_size=2)):
        refused(lambda: ods.collect_activations(other, tokenizer, ["hello"], progress=False), "split over processes", "tp_plan='auto'")
        refused(lambda: ods.steering(other, ods.CAA().fit(torch.randn(4, 32), torch.randn(4, 32)), layer=1), "split over processes")
    pieces = two.get_decoder().layers[1]  # as a plan that splits sequences would have it
    pieces.register_forward_hook(lambda block, args, y: y.chunk(2, 1)[get_rank()] if y.shape[1] > 1 else y)
    refused(lambda: ods.collect_activations(two, tokenizer, ["hello", "hallo"], layers=[1], progress=False), "a part of the activations")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.write(f"rank {get_rank()} fine\n")  # the line and its end at once: both processes write to one pipe
    sys.stdout.flush()
    torch.distributed.destroy_process_group()

"""Steer a language model by solving an ODE on its activations.

Public names are served from one table when they are first used, so that `import odesteer` costs almost nothing."""

__version__ = "0.1.0"

_MODULES = {
    "euler": "Steerer CAA ITI RepE make_steerer steerer_names load_steerer",
    "barrier": "Barrier LinearBarrier GaussianBarrier ScoreBarrier AllOf implied_barrier certificate",
    "density": "PolynomialCountSketch RandomFourierFeatures IdentityFeatures DensityRatioBarrier barrier_quality",
    "ode": "ODESteer StepODESteer integrate SOLVERS",
    "models": "decoder_layers collect_activations steering generate_text score_continuations describe_site load_model",
    "data": "load_pairs check_pairs fit_steerer",
    "micro": "load_micro",
    "baselines": "MiMiC LinAcT HPR REControl TruthFlow RandomDirection ShuffledLabels",
    "statistics": "paired_difference bootstrap_interval wilson_interval summary_table",
    "judges": "load_judge YesNoJudge ClassifierJudge RewardJudge kl_to_unsteered",
    "check": "check_steerer",
    "linear": "",
    "control": "Controller ALQR FeatureLQR Tracker SPID ActAddLFS PIDAcT BarrierLQR effort",
    "tasks": "",
    "runs": "",
    "sweeps": "",
    "results": "",
    "report": "",
    "speed": "",
    "cli": "",
    "plots": "",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

# method name -> (class, kind); the only names that a saved card may ask for
REGISTRY = {
    "caa": ("CAA", "steerer"),
    "iti": ("ITI", "steerer"),
    "repe": ("RepE", "steerer"),
    "odesteer": ("ODESteer", "steerer"),
    "step-odesteer": ("StepODESteer", "steerer"),
    "mimic": ("MiMiC", "steerer"),
    "linact": ("LinAcT", "steerer"),
    "hpr": ("HPR", "steerer"),
    "recontrol": ("REControl", "steerer"),
    "truthflow": ("TruthFlow", "steerer"),
    "alqr": ("ALQR", "controller"),
    "alqr-feature": ("FeatureLQR", "controller"),
    "spid": ("SPID", "controller"),
    "actadd-lfs": ("ActAddLFS", "controller"),
    "pid-act": ("PIDAcT", "controller"),
    "barrier-lqr": ("BarrierLQR", "controller"),
    "random": ("RandomDirection", "placebo"),
    "shuffled": ("ShuffledLabels", "placebo"),
}
__all__ = list(_HOME)


def __getattr__(name):
    from importlib import import_module
    if name in _HOME: return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES: return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'odesteer' has no attribute {name!r}")


def __dir__(): return sorted({*globals(), *__all__, *_MODULES})

"""Steer a language model by solving an ODE on its activations.

Public names are served from one table when they are first used, so that `import odesteer` costs almost nothing."""

__version__ = "0.1.0"

_MODULES = {
    "euler": "Steerer make_steerer steerer_names load_steerer",
    "barrier": "Barrier LinearBarrier GaussianBarrier ScoreBarrier AllOf implied_barrier certificate",
    "density": "PolynomialCountSketch RandomFourierFeatures IdentityFeatures DensityRatioBarrier barrier_quality",
    "ode": "integrate SOLVERS",
    "models": "decoder_layers collect_activations describe_site",
    "hooks": "steering generate_text score_continuations",
    "data": "load_pairs check_pairs fit_steerer",
    "micro": "load_micro",
    "pretrained": "load_model",
    "sites": "rank_sites",
    "baselines": "",
    "statistics": "paired_difference bootstrap_interval wilson_interval summary_table",
    "judges": "load_judge YesNoJudge ClassifierJudge RewardJudge kl_to_unsteered",
    "check": "check_steerer",
    "linear": "",
    "control": "Controller Tracker effort",
    "tasks": "",
    "runs": "",
    "sweeps": "",
    "results": "",
    "report": "",
    "speed": "",
    "explorer": "explore",
    "costs": "",
    "plans": "",
    "compose": "as_vectors strength_for_kl",
    "share": "export_vectors import_vectors",
    "serving": "",
    "scale": "",
    "demo": "",
    "commands": "",
    "cli": "",
    "plots": "",
}

# method name -> (module, class, kind): the one line that a method needs, and the only names that a saved card may ask for
_METHODS = {
    "caa": ("euler", "CAA", "steerer"),
    "iti": ("euler", "ITI", "steerer"),
    "repe": ("euler", "RepE", "steerer"),
    "odesteer": ("ode", "ODESteer", "steerer"),
    "step-odesteer": ("ode", "StepODESteer", "steerer"),
    "mimic": ("baselines", "MiMiC", "steerer"),
    "linact": ("baselines", "LinAcT", "steerer"),
    "hpr": ("baselines", "HPR", "steerer"),
    "recontrol": ("baselines", "REControl", "steerer"),
    "truthflow": ("baselines", "TruthFlow", "steerer"),
    "alqr": ("control", "ALQR", "controller"),
    "alqr-feature": ("control", "FeatureLQR", "controller"),
    "spid": ("control", "SPID", "controller"),
    "actadd-lfs": ("control", "ActAddLFS", "controller"),
    "pid-act": ("control", "PIDAcT", "controller"),
    "barrier-lqr": ("control", "BarrierLQR", "controller"),
    "random": ("baselines", "RandomDirection", "placebo"),
    "shuffled": ("baselines", "ShuffledLabels", "placebo"),
    "vector": ("compose", "SteeringVector", "made"),
    "ablation": ("compose", "Ablation", "made"),
    "gate": ("compose", "Gate", "made"),
}
REGISTRY = {name: (cls, kind) for name, (_, cls, kind) in _METHODS.items()}

_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
_HOME |= {cls: module for module, cls, _ in _METHODS.values()}
__all__ = list(_HOME)


def __getattr__(name):
    from importlib import import_module
    if name in _HOME: return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES: return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'odesteer' has no attribute {name!r}")


def __dir__(): return sorted({*globals(), *__all__, *_MODULES})


def _command():
    "The `odesteer` command, which Ctrl-C ends in one line, also in the seconds in which its modules are imported"
    import signal, sys
    pressed = []
    def interrupt(*_):
        pressed.append(True)
        imported = hasattr(sys.modules.get(f"{__name__}.commands"), "COMMANDS")  # the last name of the last to be imported
        if not imported: _stop()  # half-imported modules would swallow an exception, or print it
        raise KeyboardInterrupt
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler: signal.signal(signal.SIGINT, interrupt)
    from .cli import main
    try: code = main()
    except BaseException:
        if pressed: _stop()  # such as an ImportError of what was imported just then
        raise
    return code if code == 130 or not pressed else _stop()


def _stop():
    import os
    os.write(2, b"odesteer: stopped\n")
    os._exit(130)

"Everything that describes the package stands in settings.ini; this file only hands it to setuptools"
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist as _sdist

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def extras():
    "`dev_requirements = a b` in settings.ini is the extra `dev`"
    return {key.removesuffix("_requirements"): value.split() for key, value in cfg.items() if key.endswith("_requirements")}


def long_description():
    "README.md with links into the repository made absolute, since a package index has no repository around it"
    if not (here/"README.md").exists(): return cfg["description"]
    text = (here/"README.md").read_text(encoding="utf-8")
    for kind, prefix in (("raw", r"!\[[^\]]*\]\("), ("blob", r"(?<!!)\[[^\]]*\]\(")):
        text = re.sub(rf"({prefix})(?!https?:|#)", rf"\g<1>{cfg['git_url']}/{kind}/{cfg['branch']}/", text)
    return text


class sdist(_sdist):
    "The source distribution also carries what setup.py reads, and the notebooks and tests"
    def make_release_tree(self, base_dir, files):
        found = (p for folder in ("nbs", "tests") for p in Path(folder).rglob("*") if p.is_file() and not p.is_symlink())
        kept = [str(p) for p in found if not any(part[0] == "." or part == "__pycache__" for part in p.parts)]
        top = ["settings.ini", "_quarto.yml", "constraints.txt", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"]
        super().make_release_tree(base_dir, sorted({*files, *kept, *top}))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    url=cfg["git_url"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["odesteer*"]),
    package_data={"odesteer": ["assets/**"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras(),
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "inspect_ai": ["odesteer=odesteer.check:inspect_providers.odesteer"],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
        "vllm.general_plugins": cfg["vllm_plugins"].split(),
    },
    cmdclass={"sdist": sdist},
    zip_safe=False,
)

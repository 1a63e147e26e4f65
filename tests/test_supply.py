"""What this system is made of: licences, calls that are banned, and whom to tell of a weakness."""

import ast
import re
import subprocess
import sys
from importlib import metadata

import pytest
from test_architecture import ROOT, SOURCES

LOCK = (ROOT / "requirements.lock").read_text()
LOCKED = dict(re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([^\s;]+)", LOCK, re.MULTILINE))
ALLOWED = {
    "0BSD", "AFL-2.1", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT", "MIT-CMU",
    "MPL-2.0", "PSF-2.0", "Zlib",
}  # fmt: skip
SPELLED = {
    "Apache Software License": "Apache-2.0",
    "Apache License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
}
"""How else licences are spelled in what packages say of themselves."""


def licences(name: str) -> set[str]:
    """The SPDX names of the licences that an installed package says it has; what else it says, as it is."""
    said = metadata.metadata(name)
    text = said.get("License-Expression") or said.get("License") or ""
    # A field that holds the licence's whole text is of no use; the classifiers are.
    if not text or "\n" in text:
        found = [c.rpartition(" :: ")[2] for c in said.get_all("Classifier") or () if c.startswith("License")]
        # grain has the licence's text for a name.
        found = found or ["Apache-2.0"] * bool(re.match(r"\s*Apache License\s+Version 2\.0,", text))
    else:
        found = re.split(r" AND | OR |[()]", text)
    return {SPELLED.get(one.strip(), one.strip()) for one in found if one.strip()}


@pytest.mark.parametrize("name", sorted(LOCKED))
def test_every_locked_package_has_a_licence_of_the_list(name):
    try:
        found = licences(name)
    except metadata.PackageNotFoundError:
        line = re.search(rf"^{re.escape(name)}==.*$", LOCK, re.MULTILINE)[0]
        assert " ; " in line, "what is for every machine is installed here too"
        pytest.skip(f"not for this machine: {line}")
    assert found and found <= ALLOWED


def test_a_licence_that_is_not_on_the_list_is_found(monkeypatch):
    from email.message import Message

    stated = {
        "License-Expression": "MIT AND GPL-3.0-only",
        "License": "GPLv2",
        "Classifier": "License :: OSI Approved :: GNU Lesser General Public License",
    }
    for field, value in stated.items():
        said = Message()
        said[field] = value
        monkeypatch.setattr(metadata, "metadata", lambda name, said=said: said)
        assert licences("x") - ALLOWED


def test_the_one_package_with_gpl_code_inside_is_named():
    """PyAV's wheels contain x264 and x265, whatever its own licence is."""
    with_gpl = set()
    for name in LOCKED:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        if any(re.search(r"libx26[45]", str(path)) for path in files):
            with_gpl.add(name)
    assert with_gpl <= {"av"}
    assert "libx264" in (ROOT / "README.md").read_text().rpartition("## Licence")[2]


def banned(source: str) -> list[str]:
    """Calls that no linter knows: numpy's loading of pickles, torch's loading, and shells."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in (
                "torch.load",
                "pickle.load",
                "pickle.loads",
                "os.system",
                "os.popen",
            ):
                found.append(ast.unparse(node.func))
            for keyword in node.keywords:
                given = keyword.value.value if isinstance(keyword.value, ast.Constant) else True
                if keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and given:
                    found.append(keyword.arg)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_calls_what_is_banned(path):
    assert not banned(path.read_text())


BANNED = {
    "allow_pickle": "import numpy as np\nnp.load('a', allow_pickle=True)\n",
    "an option": "import numpy as np\noption = 1\nnp.load('a', allow_pickle=option)\n",
    "torch.load": "import torch\ntorch.load('a')\n",
    "a shell": "import subprocess\nsubprocess.run('ls', shell=True)\n",
}


@pytest.mark.parametrize("source", BANNED.values(), ids=BANNED)
def test_what_is_banned_is_found(source):
    assert banned(source)
    assert not banned("import numpy as np\nnp.load('a', allow_pickle=False)\n")


RULES = {
    "S301": "import pickle\npickle.loads(b'')\n",
    "S307": "eval('1')\n",
    "S102": "exec('1')\n",
    "S306": "import tempfile\ntempfile.mktemp()\n",
    "S602": "import subprocess\nsubprocess.run('ls', shell=True)\n",
    "S605": "import os\nos.system('ls ' + input())\n",
    "S506": "import yaml\nyaml.load('a', Loader=yaml.Loader)\n",
    "S101": "assert 1\n",
    "TID251": "from torch import load\n",
}


@pytest.mark.parametrize("rule", RULES)
def test_the_linter_holds_the_rest(rule):
    """Of code that would be in the library, by this project's own settings."""
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--no-cache", "--output-format", "concise"]
    named = ["--stdin-filename", str(ROOT / "fvdm_jax/x.py"), "-"]
    done = subprocess.run([*command, *named], input=RULES[rule], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f" {rule} " in done.stdout, done.stdout + done.stderr


def test_whom_to_tell_of_a_weakness():
    text = (ROOT / ".github/SECURITY.md").read_text()
    assert "private vulnerability reporting" in text and "@" not in text and "://" not in text

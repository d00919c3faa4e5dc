import json
import subprocess
import sys

from native_builds import require_native

import folospec as package
from folospec.cli import info
from folospec.kernels import build, native


def test_version_is_printed(folospec):
    result = folospec("--version")
    assert (result.exit_code, result.stdout) == (0, f"folospec {package.__version__}\n")


def test_help_of_every_command_needs_no_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from folospec.cli.main import app\n"
        "for command in [], ['generate'], ['demo'], ['info']:\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_info_names_what_there_is_and_why_it_is_chosen(folospec):
    result = folospec("info")
    assert result.exit_code == 0
    for words in (
        *("CPU", "memory", "GPUs", "bfloat16", "torch threads", "chosen: ", "draft_model"),
        *("ngram", "coupled, rejection, block", "cc:", "triton:", "folospec-demo-draft:"),
    ):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_info_is_there_as_json(folospec):
    facts = json.loads(folospec("info", "--json").stdout)
    assert facts["versions"]["folospec"] == package.__version__
    assert facts["cpu"]["usable_cores"] >= 1
    assert facts["attention_backend_chosen"]["name"] in facts["attention_backends"]


def test_info_says_what_the_native_kernels_were_built_for_and_where_they_are(folospec):
    library = require_native()
    facts = json.loads(folospec("info", "--json").stdout)
    assert facts["native_kernels"] == {
        "state": "available",
        "instructions": library.instructions,
        "cache": str(build.cache_folder() / "kernels"),
    }
    lines = folospec("info").stdout
    assert f"native, built for {library.instructions}" in lines
    assert "chosen: native" in lines


def test_info_says_why_there_are_no_native_kernels(folospec, monkeypatch):
    monkeypatch.setattr(native, "_loaded", lambda: (None, "there is no C++ compiler"))
    lines = " ".join(folospec("info").stdout.split())
    assert "torch's own; native CPU kernels: there is no C++ compiler" in lines
    assert "chosen: torch" in lines


def test_the_reason_follows_from_the_backends():
    assert info._why("torch", {"torch": None}) == "the only one there is"
    assert info._why("torch", {"torch": None, "x": "no GPU"}) == "the only one that can run here"
    assert info._why("x", {"torch": None, "x": None}) == "'auto' prefers it to torch"


def test_what_is_not_installed_is_none():
    assert info.package_version("folospec-no-such-package") is None
    assert info.compiler_version("folospec-no-such-compiler") is None

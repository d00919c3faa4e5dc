import json
import subprocess
import sys

import folospec as package
from folospec.cli import info


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
        *("CPU", "memory", "GPUs", "bfloat16", "torch threads", "chosen: torch", "draft_model"),
        *("ngram", "coupled, rejection, block", "cc:", "triton:", "folospec-demo-draft:"),
    ):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_info_is_there_as_json(folospec):
    facts = json.loads(folospec("info", "--json").stdout)
    assert facts["versions"]["folospec"] == package.__version__
    assert facts["cpu"]["usable_cores"] >= 1
    assert facts["attention_backend_chosen"]["name"] in facts["attention_backends"]


def test_the_reason_follows_from_the_backends():
    assert info._why("torch", {"torch": None}) == "the only one there is"
    assert info._why("torch", {"torch": None, "x": "no GPU"}) == "the only one that can run here"
    assert info._why("x", {"torch": None, "x": None}) == "'auto' prefers it to torch"


def test_what_is_not_installed_is_none():
    assert info.package_version("folospec-no-such-package") is None
    assert info.compiler_version("folospec-no-such-compiler") is None

"""docs/generate.md says what the command takes: its lines are served, its options exist."""

import json
import re
from pathlib import Path

from typer.main import get_command

from folospec.cli.batch_input import FORMATS, InputRecord
from folospec.cli.batch_request import RequestTemplate
from folospec.cli.main import app

PAGE = (Path(__file__).parents[2] / "docs" / "generate.md").read_text()
INPUT, OUTPUT = (
    [json.loads(line) for line in block.splitlines()]
    for block in re.findall(r"^```json\n(.*?)^```\n", PAGE, re.MULTILINE | re.DOTALL)
)


def test_the_lines_of_the_page_are_requests():
    template = RequestTemplate()
    requests = [template.read(InputRecord(i, "", "", value=line)) for i, line in enumerate(INPUT)]
    assert [request.id for request in requests] == ["a", "b", None]
    assert [request.is_chat for request in requests] == [False, True, False]
    assert [request.params.max_tokens for request in requests][0] == 16
    assert requests[2].params.seed == 3


def test_the_options_and_formats_of_the_page_exist():
    options = {
        name for option in get_command(app).commands["generate"].params for name in option.opts
    }
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert named <= options
    assert {"--output", "--retry-failed", "--input-format", "--chat"} <= named
    assert all(f"`{name}`" in PAGE for name in FORMATS if name != "auto")

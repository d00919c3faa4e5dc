"""The README's Python runs as it is written, in the order in which it is written."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```\n", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What each block prints."""
    outputs: list[str] = []
    lines: list[str] = []
    namespace = {
        "__name__": "readme",
        "print": lambda *values, **options: lines.append(repr(values)),
    }
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
        outputs.append("\n".join(lines))
        lines.clear()
    return outputs


def test_quick_start_has_eight_lines() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 8


def test_quick_start_gives_the_same_tokens(printed: list[str]) -> None:
    texts = printed[0].splitlines()
    assert len(texts) == 2
    assert all(text.endswith(", True)") for text in texts)


def test_a_stream_and_an_output_are_printed(printed: list[str]) -> None:
    *increments, output = printed[1].splitlines()
    assert len(increments) > 3
    assert output.startswith("(RequestOutput(request_id=")


def test_rejection_promises_the_law_alone(printed: list[str]) -> None:
    assert printed[2] == "('law',)"


def test_a_drafter_of_your_own_drafts(printed: list[str]) -> None:
    assert re.search(r"num_drafts=[1-9]", printed[3])


def test_what_the_readme_names_is_there() -> None:
    paths = re.findall(r"\]\(([\w/.]+)\)|`((?:tests|docs|examples)/[\w/.]+)`", README)
    missing = {a or b for a, b in paths if not (ROOT / (a or b)).exists()}
    assert missing == set()


def test_every_room_is_in_the_file_tree() -> None:
    rooms = [p.name for p in (ROOT / "folospec").iterdir() if (p / "__init__.py").exists()]
    assert [room for room in rooms if f"\n  {room}/ " not in README] == []


def test_every_sampling_option_is_named() -> None:
    from folospec import SamplingParams

    names = [n for n in SamplingParams.__dataclass_fields__ if not n.startswith("_")]
    assert [name for name in names if f"`{name}`" not in README] == []

"""The page of models is written from rows, and from no row that shows a fault."""

from __future__ import annotations

from functools import partial

import pytest

from docs import update

updated = partial(update.updated, path="docs/models.md")

SOURCE = {"command": "c", "time": "t", "git_uncommitted_changes": False, "git_commit": "abc"}
SOURCE |= {"transformers": "5", "torch": "2", "cpu": "a cpu"}
PAGE = "<!-- architectures: written by docs/update.py -->\n<!-- end of architectures -->\n"


def row(model_type, result, reason="", **more):
    names = {"benchmark": "architectures", "model_type": model_type, "provenance": SOURCE}
    return {**names, "result": result, "reason": reason, **more}


ROWS = [
    row("llama", "right", "error 1e-6", backend="Decoder"),
    row("olmo", "right", "error 1e-6", backend="TransformersModel"),
    row("roberta", "refused", "on plain text its logits are not its own, by 0.5 of their spread"),
    row("camembert", "refused", "on plain text its logits are not its own, by 1.1 of their spread"),
    row("lfm2", "refused", "1 of its 3 layers use the interface"),
    row("emu3", "no checkpoint", "ValueError: no"),
]


def test_every_class_stands_in_the_table_by_its_result():
    page = updated(PAGE, ROWS)
    assert "By folospec's decoder: `llama`. the others: `olmo`." in page.replace("The", "the")
    assert "| on plain text its logits are not its own | `camembert`, `roberta` |" in page
    assert "| some of its layers alone use the interface | `lfm2` |" in page
    assert "`emu3`" in page


@pytest.mark.parametrize("result", ["wrong", "crash"])
def test_a_fault_is_not_documented(result):
    with pytest.raises(ValueError, match="phi"):
        updated(PAGE, [*ROWS, row("phi", result)])


def test_the_page_in_the_repository_has_a_result_for_every_class():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    page = (update.ROOT / "docs/models.md").read_text()
    named = [name for name in NAMES if f"`{name}`" in page]
    # Later versions of transformers have other classes.
    assert len(named) > 0.9 * len(NAMES)

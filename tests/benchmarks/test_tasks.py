"""The tasks are what they say: held out, fixed, an edit is an edit, and the ideal copier copies."""

import ast
from functools import cache

import pytest
import torch

from benchmarks.acceptance import copying
from benchmarks.lib import prompts, tasks
from folospec.models.loader import load_tokenizer


@cache
def tokenizer():
    return load_tokenizer("folospec-demo")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_items_fit_the_model_and_the_first_ones_do_not_depend_on_their_number(name):
    many, few = tasks.make_task(name, tokenizer(), 6), tasks.make_task(name, tokenizer(), 2)
    assert many.items[:2] == few.items
    assert len({tuple(item.prompt_token_ids) for item in many.items}) == 6
    for item in many.items:
        assert len(item.prompt_token_ids) + item.max_tokens <= 512


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_texts_are_held_out(name):
    known = "\n".join(prompts.held_out_texts())
    flat = "".join(known.split())
    for item in tasks.make_task(name, tokenizer(), 6).items:
        prompt = tokenizer().decode(item.prompt_token_ids).removeprefix('"""')
        # Between paragraphs of prose others are left out.
        for part in prompt.split("\n\n") if name == "prose" else [prompt]:
            assert "".join(part.split())[:60] in flat


def test_an_edit_is_the_original_with_one_name_changed():
    for item in tasks.make_task("editing", tokenizer(), 8).items:
        decode = tokenizer().decode
        shown = decode(item.prompt_token_ids).split("\n\n\n")
        assert len(shown) == tasks.ORIGINALS_SHOWN + 1
        original, *_, beginning = (text.rstrip("\n") for text in shown)
        edited = beginning + "\n" + decode(item.expected_token_ids)
        rest = decode(item.prediction_token_ids)
        assert original.endswith(rest.rstrip("\n"))
        new = next(n for n in tasks.NEW_NAMES if n in edited and n not in original)
        assert new in beginning
        assert new in decode(item.expected_token_ids)
        names = tasks.renameable(original + "\n")
        assert edited.rstrip("\n") in [tasks.rename(original, name, new) for name in names]
        ast.parse(tasks._standalone(edited))


def test_renaming_leaves_longer_names_alone():
    assert tasks.rename("x = max(x, xs.x)", "x", "item") == "item = max(item, xs.item)"


def test_only_own_names_that_occur_three_times_are_renamed():
    source = "def f(a, b):\n    c = a + len(b)\n    return len(a) + len(c) + c\n"
    assert tasks.renameable(source) == ["a", "c"]


def test_prose_has_no_code():
    assert tasks._is_prose("A sentence, with words.\nAnd another one.")
    for paragraph in (">>> run()\n3.", "    indented text.", "no stop", "x[1] = {2: 3}; y(z)."):
        assert not tasks._is_prose(paragraph)


def test_too_many_items_and_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="items of prose, got count=1000"):
        tasks.make_task("prose", tokenizer(), 1000)
    with pytest.raises(ValueError, match="got 'poetry'"):
        tasks.make_task("poetry", tokenizer(), 1)


def test_steering_raises_one_token_and_leaves_its_input_alone():
    logits = torch.zeros(8)
    steered = tasks.Steering([5, 6], bonus=2.0)([1], logits)
    assert steered.tolist() == [0, 0, 0, 0, 0, 0, 2.0, 0]
    assert logits.tolist() == [0] * 8
    assert tasks.Steering([5])([1], logits).tolist() == [0] * 8


def test_only_the_steered_task_steers_and_predictions_go_to_readers_only():
    plain, steered = (
        tasks.make_task(name, tokenizer(), 1) for name in ("editing", "editing_steered")
    )
    assert plain.items == steered.items
    assert not plain.params(0, 0.0).logits_processors
    assert steered.params(0, 0.0).logits_processors
    assert plain.params(0, 0.0).prediction is None
    told = plain.params(0, 0.0, with_prediction=True).prediction
    assert list(told) == plain.items[0].prediction_token_ids
    assert steered.params(0, 0.8, repetition=2).seed == 2000


def test_the_ideal_copier_takes_the_longest_run_and_never_the_last_token():
    counts = copying.ideal_copier([1, 2, 3, 9, 1, 2, 4, 5, 6], [1, 2, 4, 5, 6, 7], [], budget=8)
    # The prompt's pass emits 1; then 2 4 5 6 are copied from the second 1, and 7 is the bonus.
    assert (counts.num_passes, counts.num_drafts, counts.num_accepted_tokens) == (2, 1, 4)
    assert counts.acceptance_length == 5.0
    assert counts.tokens_per_pass == 3.0


def test_the_ideal_copier_keeps_to_its_budget():
    counts = copying.ideal_copier([1, 2, 4, 5, 6], [1, 2, 4, 5, 6, 7], [], budget=2)
    # 1 | 2 4 and the bonus 5 | 6 and the bonus 7
    assert (counts.num_passes, counts.num_accepted_tokens) == (3, 3)


def test_a_copy_that_runs_into_itself_goes_on():
    counts = copying.ideal_copier([3], [3, 3, 3, 3, 3, 3], [], budget=10)
    assert (counts.num_passes, counts.num_accepted_tokens) == (2, 4)


def test_the_ideal_copier_needs_one_token_of_context():
    """4 is in the prompt, but nowhere after a 7."""
    assert copying.ideal_copier([4, 5], [7, 4, 9], [], budget=4).num_accepted_tokens == 0
    assert copying.ideal_copier([4, 5], [7, 4, 9], [[7, 4, 9]], budget=4).num_accepted_tokens == 1


def test_without_copies_the_ideal_copier_is_plain_decoding():
    counts = copying.ideal_copier([1, 2], [3, 4, 5], [], budget=4)
    assert (counts.num_tokens, counts.num_passes, counts.acceptance_length) == (3, 3, 1.0)
    assert copying.ideal_copier([1], [], [], budget=4) == copying.CopyCounts()

"""End tokens and sampling defaults come from files: what cannot be right is dropped and named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from folospec.models.generation_config import read_eos_token_ids, read_sampling_defaults

VOCAB = 64


def write(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def eos_of(folder, in_config=None):
    return read_eos_token_ids(folder, SimpleNamespace(eos_token_id=in_config), VOCAB)


def test_end_tokens_are_the_generation_configs_else_the_configs(tmp_path):
    assert eos_of(tmp_path) == ()
    assert eos_of(tmp_path, 5) == (5,)
    assert eos_of(write(tmp_path, top_k=3), [5, 6]) == (5, 6)
    assert eos_of(write(tmp_path, eos_token_id=[3, 63, 3]), 5) == (3, 63)
    assert eos_of(write(tmp_path, eos_token_id=None), 5) == ()


@pytest.mark.parametrize("wrong", [64, -1, 2**70, "3", "", True, 3.0, None, [3], {"id": 3}])
def test_an_end_token_that_is_no_token_id_is_dropped_and_named(tmp_path, caplog, wrong):
    assert eos_of(write(tmp_path, eos_token_id=[0, wrong])) == (0,)
    assert f"dropped {wrong!r}" in caplog.text
    assert "generation_config.json" in caplog.text
    if wrong is not None and not isinstance(wrong, list):
        assert eos_of(write(tmp_path, eos_token_id=wrong)) == ()


def test_a_config_names_its_own_file(tmp_path, caplog):
    assert eos_of(tmp_path, [64, 1]) == (1,)
    assert "/config.json" in caplog.text


def test_sampling_defaults_have_the_names_of_sampling_params(tmp_path):
    assert read_sampling_defaults(tmp_path) == {}
    fields = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}
    folder = write(tmp_path, **fields, repetition_penalty=1.1, max_new_tokens=7, num_beams=1)
    expected = {**fields, "repetition_penalty": 1.1, "max_tokens": 7}
    assert read_sampling_defaults(folder) == expected


def test_without_sampling_the_default_is_greedy(tmp_path):
    assert read_sampling_defaults(write(tmp_path, do_sample=False, temperature=0.6)) == {
        "temperature": 0.0
    }
    assert read_sampling_defaults(write(tmp_path, do_sample=True, top_p=None)) == {}


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("temperature", -1), ("temperature", "hot"), ("top_p", 1.5), ("top_k", [3]), ("min_p", {})]
    + [("repetition_penalty", 0), ("max_new_tokens", 0), ("max_new_tokens", 1.5)],
)
def test_a_default_that_is_out_of_range_is_dropped_and_named(tmp_path, caplog, field, wrong):
    folder = write(tmp_path, top_p=0.5, **{field: wrong}) if field != "top_p" else tmp_path
    if field == "top_p":
        write(tmp_path, top_p=wrong)
    found = read_sampling_defaults(folder)
    assert found == ({"top_p": 0.5} if field != "top_p" else {})
    assert f"dropped {field}={wrong!r}" in caplog.text


@pytest.mark.parametrize("text", ["", "[1]", "{", "3", "\udcff"])
def test_a_generation_config_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "generation_config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for read in (read_sampling_defaults, eos_of):
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            read(tmp_path)

"""What `folospec` offers at top level."""

import pytest

import folospec


def test_every_public_name_is_there_and_listed_once():
    assert sorted(folospec.__all__) == sorted(folospec._HOMES)
    for name in folospec.__all__:
        assert getattr(folospec, name).__name__ == name


def test_a_name_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="'NoSuchName'"):
        folospec.NoSuchName  # noqa: B018

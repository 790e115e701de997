"""Names of the logged values, as paths."""

from __future__ import annotations

import itertools

import pytest

from xent_metrics.tags import (
    BEST,
    BITS_PER_BYTE,
    BOUNDS,
    LOGGED_READINGS,
    NUM_TOKENS,
    STAGES,
    UNIFORM,
    UNIGRAM,
    Tag,
    parse_tag,
)

GROUPS = ("web", "val", "cross_entropy", "train_by_group", "a.b-c")


def all_tags() -> list[Tag]:
    """Every tag that can occur, with names of groups that are meant to confuse."""
    names = (*LOGGED_READINGS, BITS_PER_BYTE, NUM_TOKENS)
    whole = [Tag(stage, name) for stage in STAGES for name in (*names, *BOUNDS, BEST, UNIFORM, UNIGRAM)]
    whole += [Tag("train", f"{name}_epoch") for name in names]
    parts = [
        *(("group", group) for group in GROUPS),
        *(("loader", f"dataloader_idx_{i}") for i in (0, 1, 10)),
        ("loader", "books"),
    ]
    return whole + [tag._replace(by=by, part=part) for tag, (by, part) in itertools.product(whole, parts)]


def folders(tag: str) -> set[str]:
    """Return every folder that a path is in."""
    parts = tag.split("/")
    return {"/".join(parts[:i]) for i in range(1, len(parts))}


@pytest.mark.parametrize("prefix", ["", "ema/", "a.b/c/", "x-"])
def test_no_tag_is_a_folder_of_another(prefix) -> None:
    """MLflow keeps a file for each tag, which cannot be a folder too."""
    tags = {tag.text(prefix) for tag in all_tags()}
    assert not tags & set().union(*map(folders, tags))


def test_every_tag_is_told_from_every_other() -> None:
    """Tags are read back as they were written, with their prefix and with no other."""
    tags = all_tags()
    assert [parse_tag(tag.text("ema/"), "ema/") for tag in tags] == tags
    assert {parse_tag(tag.text("ema/")) for tag in tags} == {None}
    assert len({tag.text() for tag in tags}) == len(tags)
    for other in ("val", "val/", "epoch", "val/x/y", "val_by_group/x", "val_by_page/x/y", "xval/x", "val_by_loader//y"):
        assert parse_tag(other) is None


def test_lightnings_own_suffix_is_the_last_part() -> None:
    """Who looks for `/dataloader_idx_0` at the end, as Lightning does, finds it."""
    assert Tag("val", "perplexity", "loader", "dataloader_idx_0").text("ema/").endswith("/dataloader_idx_0")

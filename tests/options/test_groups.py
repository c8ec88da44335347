"""The table of groups: every group has its row, and the rows say what used to be lists of names."""

from __future__ import annotations

import pytest

from fluxrun.config.catalog import Catalog
from fluxrun.config.composition import compose
from fluxrun.config.schema import GROUPS, RunConfig
from fluxrun.errors import ConfigError
from fluxrun.options.base import Option
from fluxrun.options.groups import APPLY_ORDER, BLAME_ORDER, SEARCH_ORDER, TABLE
from fluxrun.options.memory import LADDER

ROWS = {row.name: row for row in TABLE}


def test_every_group_has_one_row() -> None:
    assert sorted(row.name for row in TABLE) == sorted(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_a_row_names_the_class_that_the_config_asks_for(group: str) -> None:
    assert RunConfig.model_fields[group].annotation is ROWS[group].base


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_a_group_is_of_its_class(group: str) -> None:
    catalog = Catalog()
    assert all(isinstance(catalog.load(group, name), ROWS[group].base) for name in catalog.names(group))


def test_the_orders() -> None:
    assert APPLY_ORDER == (
        "quantization",
        "lora",
        "memory",
        "scheduler",
        "attention",
        "kernels",
        "vae",
        "parallel",
        "cache",
        "compile",
    )
    assert BLAME_ORDER == ("compile", "cache", "kernels", "attention", "quantization", "vae", "scheduler", "parallel")
    assert SEARCH_ORDER == ("kernels", "attention", "compile", "vae", "quantization", "cache")


@pytest.mark.parametrize("rank", ["apply_rank", "blame_rank", "search_rank"])
def test_no_two_groups_share_a_rank(rank: str) -> None:
    ranks = [value for row in TABLE if (value := getattr(row, rank)) is not None]
    assert len(set(ranks)) == len(ranks)


def test_what_does_something_to_a_pipeline_is_applied() -> None:
    """A group left out of the order would silently never be applied."""
    acting = {group for group in GROUPS for option in options_of(group) if type(option).apply is not Option.apply}
    assert acting == set(APPLY_ORDER)


def test_every_group_is_searched_or_stays_as_it_was_asked_for() -> None:
    assert set(GROUPS) - set(SEARCH_ORDER) == {"model", "memory", "lora", "scheduler", "parallel"}


def test_the_ladder_is_of_memory_options() -> None:
    assert set(LADDER) == set(Catalog().names("memory")) - {"auto"}


def options_of(group: str) -> list[Option]:
    catalog = Catalog()
    return [catalog.load(group, name) for name in catalog.names(group)]


def test_an_option_of_another_group_is_refused_in_one_line() -> None:
    source = {**compose([]).source, "vae": compose([]).source["attention"]}
    with pytest.raises(
        ConfigError, match=r"vae=sdpa: Attention is no option of this group \(a subclass of .*VaeOption"
    ):
        RunConfig.from_dict(source)

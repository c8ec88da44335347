"""Everything that is compared exists: recipes, overrides that compose, and what the command line adds."""

from __future__ import annotations

from itertools import chain

import pytest

from bench.sections import SECTIONS
from bench.sections.memory import LIMITED, by_name
from bench.settings import FAST, MODELS, PLAIN, TINY_MODELS, Kept, Setting
from bench.timed import Timed, parts
from fluxrun.config.composition import compose

TIMED = [section for section in SECTIONS.values() if isinstance(section, Timed)]
EVERY = {setting.name: setting for section in TIMED for setting in chain(*section.groups)}


@pytest.mark.parametrize("setting", [s for s in EVERY.values() if s.recipe is None], ids=lambda s: s.name)
def test_every_setting_composes(setting: Setting) -> None:
    assert compose([*MODELS["klein_4b"], *setting.overrides.split(), "memory=staged"]).options()


def test_every_recipe_exists() -> None:
    from bench.plain import RECIPES

    assert {setting.recipe for setting in EVERY.values() if setting.recipe} == RECIPES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("models", [MODELS, TINY_MODELS], ids=["real", "tiny"])
def test_every_model_under_a_limit_composes(models: dict[str, tuple[str, ...]]) -> None:
    for name, limit, told in LIMITED:
        about, given = by_name(models, name, limit, told)
        config = compose(given)
        assert config.steps == about["steps"]
        assert config.memory.budget_gb == limit


def test_the_order_of_measuring_begins_with_what_plain_diffusers_is_compared_in() -> None:
    for section in TIMED:
        for group in section.groups if section.gigabytes is not None else ():
            assert group[0] == PLAIN, section.name


def test_groups_are_split_where_memory_is_short() -> None:
    one, two, three = Setting("one"), Setting("two"), Setting("three")
    group = (PLAIN, one, two, three)
    assert list(parts([group], 100)) == [list(group)]
    assert list(parts([group], 3)) == [[PLAIN, one, two], [PLAIN, three]]
    assert list(parts([(PLAIN,)], 2)) == [[PLAIN]]


def test_what_is_kept_is_named_or_new() -> None:
    everything, kept = Kept(), Kept(["h100_fast,dev fp8 group 24", "mine: quantization=fp8 compile=default"])
    assert everything.has("anything")
    assert everything.added == []
    assert kept.added == [Setting("mine", "quantization=fp8 compile=default")]
    assert all(kept.has(name) for name in (FAST.name, "mine", PLAIN.name, "dev fp8, group 24"))
    assert not kept.has("h100_lossless")

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.errors import ConfigError
from orchestrator.ensemble.members import EnsembleConfig, build_recipes, select_members
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.recipe import presets
from orchestrator.recipe.config import Recipe
from tests.support.launched import spec

each_preset = pytest.mark.parametrize("name", list(presets.PRESETS))


def members(name: str = "googlenet-digits", **config: int | float | bool) -> tuple[Recipe, ...]:
    return build_recipes(presets.PRESETS[name](), EnsembleConfig.from_dict(config))


def width(recipe: Recipe) -> float:
    assert isinstance(recipe.model, GoogLeNetConfig)
    return recipe.model.width


@each_preset
def test_seven_members_six_alike_and_the_last_wider_where_there_is_a_width(name: str) -> None:
    base, made = presets.PRESETS[name](), members(name)
    assert {recipe.seeds.weights for recipe in made} == {base.seeds.weights}
    if not isinstance(base.model, GoogLeNetConfig):
        assert [recipe.name for recipe in made] == [f"{name}-m{n}" for n in range(1, 8)]
        assert {recipe.model for recipe in made} == {base.model}
        return
    assert [recipe.name for recipe in made] == [f"{name}-m{n}" for n in range(1, 7)] + [f"{name}-m7-wide"]
    assert {width(recipe) for recipe in made[:6]} == {width(base)}
    assert width(made[6]) == width(base) * 1.25


def test_a_network_without_a_width_has_no_wider_member() -> None:
    with pytest.raises(ConfigError, match=r"^ensemble\.wider: must be 1 for model\.kind lenet-5, .* got 1\.5; set 1"):
        members("lenet-5-digits", wider=1.5)
    assert members("lenet-5-digits", wider=1) == members("lenet-5-digits")


@each_preset
def test_what_the_members_see_differs(name: str) -> None:
    made = members(name)
    for seed in ("order", "augmentation", "dropout"):
        assert len({getattr(recipe.seeds, seed) for recipe in made}) == 7
    low, high = presets.PRESETS[name]().augmentation.area
    areas = [recipe.augmentation.area for recipe in made]
    assert len(set(areas)) == 3
    assert all(low <= smallest < largest <= high for smallest, largest in areas)
    assert areas[0] == (low, high)


def test_all_else_is_shared() -> None:
    base = presets.googlenet_digits()
    for recipe in members():
        same = recipe.model_copy(
            update={
                "name": base.name,
                "seeds": base.seeds,
                "augmentation": recipe.augmentation.model_copy(update={"area": base.augmentation.area}),
                "model": recipe.model.model_copy(update={"width": width(base)}),
            }
        )
        assert same == base


def test_one_member_is_the_base_under_another_name() -> None:
    (only,) = members(members=1)
    base = presets.googlenet_digits()
    assert only == base.model_copy(update={"name": f"{base.name}-m1"})


def test_crops_and_width_can_be_left_alone() -> None:
    made = members(vary_crops=False, wider=1)
    assert len({recipe.augmentation.area for recipe in made}) == 1
    assert len({width(recipe) for recipe in made}) == 1
    assert not any(recipe.name.endswith("wide") for recipe in made)


def test_adding_a_member_keeps_all_but_the_wide_one() -> None:
    two, three = members(members=2), members(members=3)
    assert {recipe.name for recipe in two} & {recipe.name for recipe in three} == {two[0].name}
    assert two[0] == three[0]
    even = [members(members=count, wider=1) for count in (2, 3)]
    assert even[1][:2] == even[0]


def test_the_seventh_stays_the_wider_one_when_members_are_added() -> None:
    assert members(members=9)[:7] == members(members=7)
    assert [width(one) > width(members()[0]) for one in members(members=9)] == [False] * 6 + [True] + [False] * 2


def test_the_wider_member_can_be_chosen() -> None:
    assert [recipe.name for recipe in members(members=3, wider_member=1)] == [
        f"googlenet-digits-{name}" for name in ("m1-wide", "m2", "m3")
    ]
    with pytest.raises(ConfigError, match=r"^ensemble\.wider_member: must be at most ensemble\.members \(3\), got 4"):
        members(members=3, wider_member=4)


@given(st.integers(1, 40), st.sampled_from(sorted(presets.PRESETS)), st.floats(1, 4), st.booleans())
def test_every_number_of_members_is_valid_and_each_is_a_run_of_its_own(
    count: int, name: str, wider: float, vary: bool
) -> None:
    has_width = isinstance(presets.PRESETS[name]().model, GoogLeNetConfig)
    made = members(name, members=count, wider=wider if has_width else 1.0, vary_crops=vary)
    assert len(made) == count
    assert len({spec(recipe).name for recipe in made}) == count
    assert len({spec(recipe.model_copy(update={"name": "x"})).identity for recipe in made}) == count
    for recipe in made:
        assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_an_impossible_width_is_rejected() -> None:
    base = presets.googlenet_tiny()
    broad = base.model_copy(update={"model": base.model.model_copy(update={"width": 7.0})})
    with pytest.raises(ConfigError, match="width"):
        build_recipes(broad, EnsembleConfig())


def test_members_are_selected_by_number() -> None:
    assert list(select_members(3, ())) == [1, 2, 3]
    assert list(select_members(3, (3, 1))) == [3, 1]
    for numbers in ((1, 4), (0,), (2, 2)):
        with pytest.raises(ConfigError, match=r"^members: must be different numbers from 1 to 3, got \d"):
            select_members(3, numbers)

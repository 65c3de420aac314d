"""Settings as paths and values."""

from dataclasses import asdict

from pydantic import Field

from sorsa_ds.config.declare import settings
from sorsa_ds.config.yaml_io import flat


@settings
class Section:
    """A section."""

    named: dict[str, int] = Field(default_factory=dict)
    perhaps: dict[str, int] | None = None
    size: int = 1


@settings
class Whole:
    """Settings with one section."""

    section: Section = Field(default_factory=Section)


def test_a_setting_that_is_a_mapping_is_one_value_whatever_its_name():
    config = Whole(section=Section(named={"a": 1}, perhaps={"b": 2}))
    expected = {"section.named": {"a": 1}, "section.perhaps": {"b": 2}, "section.size": 1}
    assert flat(asdict(config), schema=Whole) == expected
    assert flat({"columns": {"a": (1, 2)}, "b": 3}, "of ") == {"of columns.a": [1, 2], "of b": 3}

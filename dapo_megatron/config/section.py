"""What all sections of a recipe share: unknown keys refused, no silent conversion, no change after loading."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: one YAML mapping, one class.

    Types are strict: neither "3" nor 3.0 nor true is an integer; an integer is accepted for a float. Infinite and NaN
    numbers are refused. Raises pydantic.ValidationError, which `load_recipe` turns into one line a problem.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults, and those that have none."""
        fields = type(self).model_fields.items()
        return {
            name: value
            for name, field in fields
            if (value := getattr(self, name)) != field.get_default(call_default_factory=True)
        }

"""What all sections of settings have in common."""

from __future__ import annotations

from typing import TypeVar

# pydantic, not jsonargparse: pydantic reports every fault of a file, jsonargparse stops at the first.
from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings. Unknown keys are errors. The docstring of an attribute is its help text."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


Schema = TypeVar("Schema", bound=Section)


def subsection(schema: type[Section], name: object) -> type[Section] | None:
    """The schema of the section `name` of a schema; None if that is a single setting or unknown."""
    field = schema.model_fields.get(name) if isinstance(name, str) else None
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None

"""What every section of a configuration is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of the file: unknown keys and numbers given as strings are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

"""What every section of a configuration is."""

from pydantic import BaseModel, ConfigDict

# What a signed 32-bit integer holds: no count, length or seed needs more, and libraries
# that take a larger one fail late.
MAX_INTEGER = 2**31 - 1


class Section(BaseModel):
    """A mapping of the file: unknown keys and numbers given as strings are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

"""The errors of glm3kit: one base class, one class a subject.

A message says what failed, where, what was found, what was expected, and what to do next.

    try: load_config("run.yaml")
    except Glm3KitError as err: print(err)
"""


class Glm3KitError(Exception):
    """Base of every error that glm3kit raises on purpose."""


class ConfigError(Glm3KitError, ValueError):
    """A configuration that cannot be used; lists every fault with file and line."""


class RankTableError(Glm3KitError, ValueError):
    """A rank table that is missing, unfinished, damaged or does not fit the machine."""


class DataError(Glm3KitError, ValueError):
    """A data file, a tokenizer file or a row that cannot be used; names file and line."""


class PromptError(Glm3KitError, ValueError):
    """A message that cannot be encoded, such as one with an unknown role."""


class CheckpointError(Glm3KitError, ValueError):
    """Weights or a checkpoint that are missing, damaged or of another shape."""


class JobError(Glm3KitError, RuntimeError):
    """A training job that could not start, failed or was stopped."""

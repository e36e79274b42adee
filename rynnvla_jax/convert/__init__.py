"""Converts public checkpoints to model directories and back, streamed. Besides deploy/ only this package uses torch."""


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the file and the keys, and says what to do."""

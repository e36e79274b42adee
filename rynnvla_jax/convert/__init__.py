"""Foreign checkpoints <-> model directories, streamed. The only room beside deploy/ that may import torch."""


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the file, the keys and the remedy."""

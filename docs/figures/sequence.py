"""Draws sequence.svg: the training sequences of stages 1 to 3, composed by the code that training uses.

`python docs/figures/sequence.py`. Frames of 32 x 32 pixels keep the figure small: 2 x 2 codes instead of 24 x 24.
"""

from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

from rynnvla_jax.config import SequenceConfig, TrainConfig, from_dict
from rynnvla_jax.configs import robot, trajectory, video
from rynnvla_jax.sequence import Sequence, compose
from rynnvla_jax.vocabulary import Vocabulary

FRAMES = 2
WORDS = ("<s>", "lift", "the", "cup")
VOCABULARY = Vocabulary(
    base_size=100,
    bos=20,
    begin_image=1,
    end_image=2,
    new_line=3,
    grid_tokens=(4,),
    code_to_token=np.arange(50, 82),
)
TEXT = np.arange(20, 20 + len(WORDS))
CELL, HEIGHT, LEFT, ROW = 29, 26, 64, 104  # pixels
COLOURS = {"text": "#cfd8dc", "front": "#ffcc80", "wrist": "#a5d6a7", "state": "#b39ddb", "action": "#ef9a9a"}
NAMES = {"text": "instruction", "front": "front frame", "wrist": "wrist frame", "state": "", "action": ""}
STAGES = (
    ("Stage 1, video", video, "predicts frames from the first frame and the instruction"),
    ("Stage 2, trajectory", trajectory, "state and actions are those of the human wrists"),
    ("Stage 3, robot", robot, "two cameras; state and actions are those of the robot"),
)


def sequence_of(module) -> tuple[Sequence, SequenceConfig]:
    """The sequence that the config file of a stage describes, with `FRAMES` frames and without padding."""
    config = replace(from_dict(TrainConfig, module.get_config("7b").to_dict()).sequence, num_frames=FRAMES)
    codes = np.arange(FRAMES * 4).reshape(FRAMES, 2, 2)
    return compose(TEXT, {v: codes + 16 * i for i, v in enumerate(config.views)}, VOCABULARY, config), config


def kinds(tokens: np.ndarray) -> list[tuple[str, str]]:
    """(kind, label) of every token."""
    labels = {VOCABULARY.begin_image: "[", VOCABULARY.end_image: "]", VOCABULARY.new_line: "↵"}
    labels |= {VOCABULARY.wrist_start: "[", VOCABULARY.wrist_end: "]"}
    found, view = [], "front"
    for i, token in enumerate(tokens.tolist()):
        if token == VOCABULARY.wrist_start:
            view = "wrist"
        elif token == VOCABULARY.begin_image:
            view = "front"
        if token in (VOCABULARY.state, VOCABULARY.action):
            found.append(("state", "s") if token == VOCABULARY.state else ("action", "a"))
        elif token in TEXT:
            found.append(("text", WORDS[token - TEXT[0]]))
        elif token == VOCABULARY.grid_tokens[0]:
            before = tokens[i - 1]
            found.append((view, "w" if before == token else "h"))
        else:
            found.append((view, labels.get(token, "c")))
    return found


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def row(sequence: Sequence, first: int, last: int, y: float, t: int) -> list[str]:
    """Draws tokens `first` to `last` (excluded), those of frame `t`, at height `y`."""
    parts = [text(LEFT - 8, y + 17, f"frame {t}", anchor="end")]
    labelled = kinds(sequence.tokens)[first:last]
    for i, (kind, label) in enumerate(labelled):
        x = LEFT + i * CELL
        parts.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{HEIGHT}" fill="{COLOURS[kind]}" stroke="#fff"/>')
        parts.append(text(x + CELL / 2, y + 17, label))
        if sequence.loss_mask[first + i]:
            parts.append(f'<rect x="{x + 1}" y="{y + HEIGHT + 2}" width="{CELL - 2}" height="6" fill="#37474f"/>')
        begins = i == 0 or labelled[i - 1][0] != kind
        if begins and NAMES[kind]:
            parts.append(text(x, y - 6, NAMES[kind], anchor="start", more=' fill="#546e7a"'))
    if sequence.action_positions[t] >= 0:
        parts += action(LEFT + (sequence.action_positions[t] - 1 - first) * CELL + CELL / 2, y + HEIGHT + 10)
    return parts


def action(x: float, y: float) -> list[str]:
    """Draws the arrow to the action head at `x`, one position before <action>."""
    down = f"M{x:g} {y:g} v16 m-4 -6 l4 6 l4 -6"
    return [
        f'<path d="{down}" fill="none" stroke="#c62828" stroke-width="1.6"/>',
        text(x + 32, y + 30, "action head: 64 numbers", anchor="end", more=' fill="#c62828"'),
    ]


def draw() -> str:
    """The whole figure as SVG."""
    sequences = [sequence_of(module) for _, module, _ in STAGES]
    width = LEFT + max(len(s.tokens) for s, _ in sequences) // FRAMES * CELL + 24
    parts, y = [], 12
    for (title, _, says), (sequence, config) in zip(STAGES, sequences, strict=True):
        parts.append(text(16, y + 14, title, 15, "start", ' font-weight="bold"'))
        parts.append(text(196, y + 14, says, 12, "start", ' fill="#546e7a"'))
        y += 46
        each = len(sequence.tokens) // FRAMES
        for t in range(FRAMES):
            parts += row(sequence, t * each, (t + 1) * each, y, t)
            y += ROW if config.use_state else ROW - 36
    parts += legend(y)
    size = f'viewBox="0 0 {width} {y + 80}" width="{width}" height="{y + 80}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" fill="#263238">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff" rx="6"/>', *parts, "</svg>"]) + "\n"


def legend(y: float) -> list[str]:
    lines = (
        "[ ] begin and end of a frame (the wrist camera has its own)    h w  height and width in blocks of 32 pixels",
        "c  VQ code of 16 x 16 pixels    ↵  end of a line    s  state (its embedding is a projection)    a  <action>",
    )
    bar = f'<rect x="16" y="{y + 46}" width="{CELL - 2}" height="6" fill="#37474f"/>'
    says = "target of the cross-entropy, predicted one position earlier"
    shown = [text(16, y + 4 + 22 * i, line, 12, "start", ' xml:space="preserve"') for i, line in enumerate(lines)]
    return [*shown, bar, text(16 + CELL + 6, y + 53, says, 12, "start")]


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")

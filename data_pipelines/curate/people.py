"""Hands and faces in a photograph: MediaPipe's palm, hand and full-range face networks run by ai-edge-litert.

Source: MediaPipe 0.10.21, its networks and the constants of its graphs hand_landmark_tracking and
face_detection_full_range.
Frames are processed one by one, without tracking between frames. The body networks are not used: they derive hands from
a body, and an ego-centric view does not show the body.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

from data_pipelines.curate.config import CurateConfig
from rynnvla_jax.storage import fetch

BONES = (  # pairs of landmarks that a bone joins: wrist 0, then thumb to little finger from the palm outwards
    *((0, 1), (1, 2), (2, 3), (3, 4)),
    *((0, 5), (5, 6), (6, 7), (7, 8)),
    *((5, 9), (9, 10), (10, 11), (11, 12)),
    *((9, 13), (13, 14), (14, 15), (15, 16)),
    *((13, 17), (0, 17), (17, 18), (18, 19), (19, 20)),
)
_EDGE = 192  # pixels of the palm and face networks' input
_CROP = 224  # of the hand network's
_SAME = 0.3  # overlap from which two boxes are the same object
_MAX_HANDS = 4  # palms per frame that are examined, the highest score first
WEAK_FACE = 0.3  # faces from this score on are kept, so that thresholds can be judged afterwards
_COVERED = 0.5  # share of a face's box, inside the box around a hand, from which the "face" is that hand
_AROUND = 0.2  # by which the flesh of a hand goes beyond its landmarks, as a share of their extent


@dataclass(frozen=True, eq=False)
class Hand:
    """`points` float32 [21, 2]: x, y in pixels of the frame, wrist first (see `BONES`)."""

    points: np.ndarray
    score: float


@dataclass(frozen=True, eq=False)
class Face:
    """`box` float32 [4]: left, top, right, bottom in pixels of the frame."""

    box: np.ndarray
    score: float


@dataclass(frozen=True)
class Found:
    """Hands found in one frame, and faces from the score `WEAK_FACE` on."""

    hands: tuple[Hand, ...]
    faces: tuple[Face, ...]

    def faces_that_count(self, score: float) -> list[Face]:
        """Those of at least this score that are not one of the hands: to the network, bare skin looks like a face."""
        return [f for f in self.faces if f.score >= score and not any(_covers(hand, f) for hand in self.hands)]


class People:
    """Finds people with the networks that `rynnvla fetch people` downloads. Not thread-safe."""

    def __init__(self, config: CurateConfig):
        """Raises FetchError naming the command when the networks were not downloaded."""
        folder = fetch.path("people")
        palm_anchors = np.concatenate([_anchors(8, 2), _anchors(16, 6)])
        self._palms = _Detector(folder / "palm_detection_full.tflite", palm_anchors, 0.0, config.palm_score)
        face = folder / "face_detection_full_range_sparse.tflite"
        self._faces = _Detector(face, _anchors(4, 1), -1.0, min(WEAK_FACE, config.face_score))
        self._landmarks = _Network(folder / "hand_landmark_full.tflite")
        self._hand_score = config.hand_score

    def find(self, frame: np.ndarray) -> Found:
        """`frame` uint8 [H, W, 3] RGB."""
        image = Image.fromarray(frame)
        faces = tuple(Face(box, score) for box, _, score in self._faces.find(image))
        palms = self._palms.find(image)[:_MAX_HANDS]
        hands = (self._hand(image, box, points) for box, points, _ in palms)
        return Found(tuple(h for h in hands if h.score >= self._hand_score), faces)

    def _hand(self, image: Image.Image, box: np.ndarray, points: np.ndarray) -> Hand:
        """Landmarks in a square that is turned so that the hand points up, moved towards the fingers and enlarged."""
        wrist, finger = points[0], points[2]  # the finger is the middle one's knuckle
        angle = math.atan2(finger[1] - wrist[1], finger[0] - wrist[0]) + math.pi / 2
        across, along = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
        width, height = box[2] - box[0], box[3] - box[1]
        scale = 2.6 * max(width, height) / _CROP
        corner = (box[:2] + box[2:]) / 2 - 0.5 * height * along - _CROP / 2 * scale * (across + along)
        matrix = np.column_stack([scale * across, scale * along, corner])  # crop -> frame
        # Pillow counts from pixel corners, the matrix too: no half pixel between them.
        crop = image.transform(
            (_CROP, _CROP), Image.Transform.AFFINE, matrix.ravel().tolist(), Image.Resampling.BILINEAR
        )
        landmarks, present = self._landmarks(np.asarray(crop, np.float32) / 255)[:2]
        points = landmarks.reshape(21, 3)[:, :2] @ matrix[:, :2].T + matrix[:, 2]
        return Hand(points.astype(np.float32), float(present[0]))


class _Network:
    """One .tflite file."""

    def __init__(self, path: Path):
        self._interpreter = Interpreter(str(path), num_threads=1)  # a worker has as many threads as it is given
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._outputs = [d["index"] for d in self._interpreter.get_output_details()]

    def __call__(self, pixels: np.ndarray) -> list[np.ndarray]:
        """`pixels` float32 [H, W, 3]; every output without its batch axis."""
        self._interpreter.set_tensor(self._input, pixels[None])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(i)[0] for i in self._outputs]


class _Detector:
    """A single-shot detector: offsets and a score for every anchor, then non-maximum suppression."""

    def __init__(self, path: Path, anchors: np.ndarray, low: float, threshold: float):
        """`anchors` [n, 2] are centres as shares of the input; its pixels go from `low` to 1."""
        self._network, self._anchors, self._low, self._threshold = _Network(path), anchors * _EDGE, low, threshold

    def find(self, image: Image.Image) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """(box [4], key points [k, 2], score), in pixels of `image`, the surest first."""
        scale = _EDGE / max(image.size)
        width, height = (round(edge * scale) for edge in image.size)
        left, top = (_EDGE - width) // 2, (_EDGE - height) // 2
        square = np.zeros((_EDGE, _EDGE, 3), np.float32)
        small = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        square[top : top + height, left : left + width] = small
        offsets, logits = self._network(square / 255 * (1 - self._low) + self._low)
        scores = 1 / (1 + np.exp(-np.clip(logits[:, 0], -80, 80)))
        likely = scores >= self._threshold
        offsets, scores, anchors = offsets[likely], scores[likely], self._anchors[likely]
        centre, half = offsets[:, :2] + anchors, offsets[:, 2:4] / 2
        points = offsets[:, 4:].reshape(len(offsets), offsets.shape[1] // 2 - 2, 2) + anchors[:, None]
        boxes = np.concatenate([centre - half, centre + half], axis=1)
        moved = np.array([left, top])
        return [
            ((box.reshape(2, 2) - moved).ravel() / scale, (point - moved) / scale, score)
            for box, point, score in _merged(boxes, points, scores)
        ]


def _covers(hand: Hand, face: Face) -> bool:
    """Whether a hand fills the box of a face. A hand before a face fills a part of it only."""
    low, high = hand.points.min(0), hand.points.max(0)
    margin = _AROUND / 2 * (high - low)
    edges = np.minimum(high + margin, face.box[2:]) - np.maximum(low - margin, face.box[:2])
    return bool(np.maximum(edges, 0).prod() >= _COVERED * (face.box[2:] - face.box[:2]).prod())


def _anchors(stride: int, per_cell: int) -> np.ndarray:
    """[n, 2]: the middle of every cell of a grid over the input, as shares of it."""
    middles = (np.arange(_EDGE // stride) + 0.5) * stride / _EDGE
    grid = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)
    return np.repeat(grid, per_cell, axis=0)


def _merged(boxes: np.ndarray, points: np.ndarray, scores: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Boxes that overlap become their mean, weighted by score, with the best one's score."""
    left, merged = np.argsort(-scores, kind="stable"), []
    while len(left):
        same = _overlap(boxes[left[0]], boxes[left]) > _SAME
        same[0] = True  # a degenerate box overlaps with nothing, not even itself
        group = left[same]
        weights = scores[group] / scores[group].sum()
        merged.append((weights @ boxes[group], np.tensordot(weights, points[group], 1), float(scores[group[0]])))
        left = left[~same]
    return merged


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union, [n]."""
    edges = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.prod(np.maximum(edges, 0), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    return shared / (np.prod(box[2:] - box[:2]) + areas - shared + 1e-9)

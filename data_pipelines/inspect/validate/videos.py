"""Decodes every frame of every video, several files at a time, and reports the wrong frames of each episode."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np

from data_pipelines.cut_off import COPY, remedy
from data_pipelines.episode import DataError
from data_pipelines.inspect.validate.audit import Audit
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.pictures import Look
from data_pipelines.video import FAULTS, LIMITS, RATE, RATE_IN_ORDER, FrameTimes, frame_times
from rynnvla_jax.errors import listing, shorten
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import files


@dataclass(frozen=True)
class Segment:
    """`count` frames starting with `first` should belong to `episode`, seen by the camera `view`.

    Of a camera that is not `used`, faults are warnings: training does not open its files.
    """

    episode: str
    first: int
    count: int
    view: str = "front"
    used: bool = True


@dataclass
class Decoded:
    """Result of decoding a whole file. `present` are the frame numbers by time stamp, ascending."""

    rate: float = 0.0
    present: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    faults: list[tuple[int, str]] = field(default_factory=list)  # (frame number, what)
    digests: list[bytes] = field(default_factory=list)  # of the pictures of each segment
    looks: list[Look] = field(default_factory=list)  # of each segment
    unreadable: str = ""


def check_videos(
    findings: Findings,
    videos: dict[Path, list[Segment]],
    fps: float,
    what: str,
    whole: bool,
    audit: Audit,
    progress: bool,
    in_order: Collection[Path] = (),
    partial: bool = False,
) -> None:
    """Decodes every file of `videos`, whose segments ascend, but those that only left-out episodes use. `fps` 0 means
    each file's own rate.

    Frames of the files `in_order` are numbered by their order, as in the loader.

    `whole`: a file belongs to one episode, so that extra frames are an error and not only a warning; `partial`: not all
    episodes are known, so that frames after the last segment are no fault.
    """
    seen: dict[bytes, tuple[Segment, Path]] = {}
    needed = {p: parts for p, parts in videos.items() if not parts or {s.episode for s in parts} - findings.left_out}
    there = {path: segments for path, segments in needed.items() if path.is_file()}
    for path in needed.keys() - there.keys():
        names = [s.episode for s in needed[path]]
        message = f"this file is missing, but the metadata refer to it{_of(names)}; {COPY}"
        _say(findings, needed[path])("file reference", path, None, message, names)
    for path, segments, decoded in _decode_all(there, fps, in_order, what, progress):
        findings.looked_at["videos"] += 1
        findings.looked_at["frames"] += len(decoded.present)
        names, say = [s.episode for s in segments], _say(findings, segments)
        if decoded.unreadable:
            say("video", path, None, decoded.unreadable, names)
            continue
        if fps and abs(decoded.rate - fps) > (RATE_IN_ORDER if path in in_order else RATE) * fps:
            message = f"runs at {decoded.rate:.3f} fps but the metadata state {fps:g}"
            say("frame rate", path, None, message, names)
        _compare(findings, path, segments, decoded)
        if not partial:
            _check_end(findings, path, segments, decoded, whole)
        for segment, digest, look in zip(segments, decoded.digests, decoded.looks, strict=True):
            if segment.episode in findings.left_out:
                continue
            audit.view(segment.episode, segment.view, look, path, segment.first)
            other, where = (segment, path) if look.empty else seen.setdefault(digest, (segment, path))
            if other is not segment:
                message = (
                    f"{segment.episode} has the same pictures as {other.episode} ({where}, from frame {other.first})"
                )
                _say(findings, [segment, other])("duplicate", path, segment.first, message, [segment.episode])


def _say(findings: Findings, segments: Sequence[Segment]) -> Callable[..., None]:
    """How a fault of these segments is reported."""
    return findings.error if all(s.used for s in segments) else findings.warn


def _compare(findings: Findings, path: Path, segments: list[Segment], decoded: Decoded) -> None:
    say = _say(findings, segments)
    for at, message in decoded.faults:
        say("video", path, at, message, [s.episode for s in segments if 0 <= at - s.first < s.count])
    for s in segments:
        numbers = decoded.present[(decoded.present >= s.first) & (decoded.present < s.first + s.count)] - s.first
        lacking = s.count - len(numbers)
        if lacking:
            first = s.first + int(np.argmin(np.append(numbers, -1) == np.arange(len(numbers) + 1)))
            say(
                "frame count",
                path,
                first,
                f"{s.episode} has {s.count} rows, but {lacking} frames are missing, the first at step "
                f"{first - s.first}",
                [s.episode],
            )


def _check_end(findings: Findings, path: Path, segments: list[Segment], decoded: Decoded, whole: bool) -> None:
    count = int(decoded.present[-1]) + 1 if len(decoded.present) else 0
    end = max((s.first + s.count for s in segments), default=0)
    if count > end and segments:
        say = _say(findings, segments) if whole else findings.warn
        message = f"{count - end} of {count} frames do not belong to any row"
        say("frame count", path, end, message, [segments[-1].episode] if whole else [])


def _decode_all(
    videos: dict[Path, list[Segment]], fps: float, in_order: Collection[Path], what: str, progress: bool
) -> Iterator[tuple[Path, list[Segment], Decoded]]:
    """In the order of `videos`. Few files are decoded with several threads each, many with one each."""
    cores = os.cpu_count() or 1
    threads = max(1, cores // max(1, len(videos)))
    total = sum(s.count for segments in videos.values() for s in segments)
    with (
        progress_bar(total=total, desc=f"{what}: frames", unit="frame", show=progress) as bar,
        ThreadPoolExecutor(min(cores, max(1, len(videos)))) as pool,
    ):
        jobs = [
            pool.submit(_decode, path, segments, fps, path in in_order, threads, bar.update)
            for path, segments in videos.items()
        ]
        try:
            for (path, segments), job in zip(videos.items(), jobs, strict=True):
                yield path, segments, job.result()
        finally:
            for job in jobs:
                job.cancel()


def _decode(
    path: Path,
    segments: Sequence[Segment],
    fps: float,
    in_order: bool,
    threads: int,
    tick: Callable[[int], object],
) -> Decoded:
    try:
        times = frame_times(str(path), fps) if in_order else None
    except DataError as error:
        return Decoded(unreadable=str(error))
    try:
        container = av.open(str(path), metadata_errors="replace")
    except FAULTS as error:
        return _unreadable(path, shorten(error))
    with container:
        if not container.streams.video:
            return _unreadable(path, "no video stream")
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 0)
        if not rate or stream.time_base is None:
            return _unreadable(path, "it does not state its frame rate")
        if stream.codec_context is None:
            return _unreadable(path, "its codec is not known")
        stream.thread_type = "FRAME" if threads > 1 else "NONE"
        stream.codec_context.thread_count = threads
        stream.codec_context.options = LIMITS
        reader = _Reading(segments, fps or rate, float(stream.time_base), stream.start_time or 0, times)
        try:
            for packet in container.demux(stream):
                frames = reader.decode(packet)
                tick(len(frames))
        except FAULTS as error:  # the container itself breaks off
            reader.fault(shorten(error))
        present = np.unique(np.array(reader.numbers, np.int64))
        return Decoded(rate, present, reader.faults, reader.digests(), reader.looks)


def _unreadable(path: Path, reason: str) -> Decoded:
    return Decoded(unreadable=files.damage(path, f"cannot be opened as a video ({reason}); {remedy(path)}"))


class _Reading:
    """Frames as they come: their numbers, and a digest of each segment's pictures."""

    def __init__(self, segments: Sequence[Segment], fps: float, time_base: float, start: int, times: FrameTimes | None):
        self.numbers: list[int] = []
        self.faults: list[tuple[int, str]] = []
        self.looks = [Look(s.count) for s in segments]
        self._segments, self._hashes = segments, [hashlib.blake2b(digest_size=16) for _ in segments]
        self._fps, self._time_base, self._start, self._times = fps, time_base, start, times
        self._size: tuple[int, int] | None = None
        self._at = 0  # segment of the last frame

    def decode(self, packet) -> list:
        """Frames of `packet`; a packet that cannot be decoded is a fault, and the next one is tried."""
        try:
            frames = packet.decode()
        except FAULTS as error:
            self.fault(shorten(error))
            return []
        for frame in frames:
            self._take(frame)
        return frames

    def fault(self, message: str) -> None:
        """Of consecutive faults only the first is kept."""
        at = self.numbers[-1] + 1 if self.numbers else 0
        if not self.faults or self.faults[-1][0] != at:
            self.faults.append((at, f"cannot be decoded from here ({message})"))

    def _take(self, frame) -> None:
        last = self.numbers[-1] if self.numbers else -1
        if frame.pts is None:
            self.faults.append((last + 1, "the frame has no time stamp"))
            return
        if self._times is not None:
            number = self._times.number(frame.pts)
        else:
            number = round((frame.pts - self._start) * self._time_base * self._fps)
        if number == last:
            self.faults.append((last, "two frames have this time stamp; the frame rate is uneven"))
        if frame.is_corrupt:
            self.faults.append((number, "the picture is damaged"))
            return
        self.numbers.append(number)
        size = (frame.height, frame.width)
        if self._size is not None and self._size != size:
            message = f"the size changes from {self._size[0]} x {self._size[1]} to {size[0]} x {size[1]}"
            self.faults.append((number, message))
        self._size = size
        while self._at < len(self._segments) and number >= self._end(self._at):
            self._at += 1
        if self._at < len(self._segments) and number >= self._segments[self._at].first:
            luma = frame.planes[0]  # its rows are padded to `line_size`
            pixels = np.frombuffer(luma, np.uint8).reshape(-1, luma.line_size)[: frame.height, : frame.width]
            self._hashes[self._at].update(np.ascontiguousarray(pixels).data)
            self.looks[self._at].add(round(number) - self._segments[self._at].first, pixels)

    def _end(self, segment: int) -> int:
        return self._segments[segment].first + self._segments[segment].count

    def digests(self) -> list[bytes]:
        """One digest per segment; a segment without pictures gets a unique one."""
        empty = hashlib.blake2b(digest_size=16).digest()
        return [
            h.digest() if h.digest() != empty else f"{s.episode} {i}".encode()
            for i, (h, s) in enumerate(zip(self._hashes, self._segments, strict=True))
        ]


def _of(names: Sequence[str]) -> str:
    return f" ({listing(names, 3)})" if names else ""

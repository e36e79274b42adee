"""Makes a small copy of a LeRobot (v3.0, v2.1) or EgoDex data set: all episodes, with videos scaled down.

    python -m data_pipelines.demo.make_demo --source lerobot:DIR --output OUT --size 128

Rows, poses and texts are not changed; videos become square-pixel h264 whose shortest edge is `--size`, and
meta/info.json states the new size.
"""

import json
import shutil
from pathlib import Path

import av
import tyro

from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage.mp4 import KEY_FRAMES, Mp4Writer


def reencode(source: Path, target: Path, size: int, crf: int) -> tuple[int, int]:
    """Writes `target` (h264, yuv420p) with the frames of `source`; returns its (height, width) in pixels."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as reader:
        video = reader.streams.video[0]
        if video.average_rate is None:
            raise ValueError(f"{source} does not state its frame rate")
        scale = size / min(video.width, video.height)
        width, height = (round(edge * scale / 2) * 2 for edge in (video.width, video.height))
        options = {"crf": str(crf), "preset": "veryslow", "g": str(KEY_FRAMES)}
        with Mp4Writer(target, video.average_rate, options) as writer:
            for frame in reader.decode(video):
                small = frame.reformat(width, height, "yuv420p", interpolation="AREA")
                small.pict_type = av.video.frame.PictureType.NONE  # the encoder chooses its own key frames
                writer.add(small)
    return height, width


def shrink(source: Path, output: Path, size: int, crf: int) -> None:
    """Copies the data set at `source` to `output`. Raises FileExistsError when `output` is not empty."""
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another --output")
    sizes = {}
    files = sorted(p for p in source.rglob("*") if p.is_file())
    for file in progress_bar(files, desc=source.name):
        target = output / file.relative_to(source)
        if file.suffix == ".mp4":
            sizes[file.relative_to(source).as_posix()] = reencode(file, target, size, crf)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    info = output / "meta" / "info.json"
    if info.exists():
        content = json.loads(info.read_text(encoding="utf-8"))
        for key, feature in content["features"].items():
            if feature["dtype"] == "video":
                height, width = next(s for name, s in sizes.items() if f"/{key}/" in name)
                feature["shape"] = [height, width, 3]
                changes = {"video.height": height, "video.width": width, "video.codec": "h264"}
                feature.setdefault("info", {}).update(changes)
        info.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def main(source: str, output: Path, size: int = 128, crf: int = 23) -> None:
    """Makes a small copy of a LeRobot (v3.0, v2.1) or EgoDex data set: all episodes, with videos scaled down.

    Args:
      source: lerobot:DIR or egodex:DIR.
      output: The new folder.
      size: Shortest edge of the videos, in pixels.
      crf: Quality of x264: larger is smaller.
    """
    shrink(Path(source.partition(":")[2]), output, size, crf)


if __name__ == "__main__":
    tyro.cli(main)

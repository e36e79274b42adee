"""Tiny data sets in exactly the layouts that sources read. The brightness of a frame encodes its number."""

import io
import json
import struct
from pathlib import Path

import google_crc32c
import h5py
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from rynnvla_jax.storage.mp4 import Mp4Writer


def write_video(path, frames, rate=30, **options):
    with Mp4Writer(path, rate, {"g": "10", "crf": "10"}, options) as video:
        for frame in frames:
            video.add(frame)


def grey_ramp(count, size=32, width=None, first=0):
    """Frame i has brightness 40 + 4 (first + i): `numbers_of` reads its number back."""
    shades = (40 + 4 * (first + np.arange(count))).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (count, size, width or size, 3))


def halved(frames):
    """The frames with a lighter upper and a darker lower half: not a single colour, and `numbers_of` reads the same."""
    out = frames.copy()
    middle = out.shape[1] // 2
    out[:, :middle] += 8
    out[:, -middle:] -= 8
    return out


def numbers_of(frames):
    return np.round((frames.astype(float).mean((1, 2, 3)) - 40) / 4).astype(int).tolist()


def rotations(count, seed=0):
    return np.stack([np.linalg.qr(m)[0] for m in np.random.default_rng(seed).normal(size=(count, 3, 3))])


def write_egodex(root, count=12, text="lift the cup", which="1", name="0"):
    """A camera with large motions, so that mixing up frames of reference changes the results."""
    folder = root / "part1" / "lift"
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    poses = {n: np.tile(np.eye(4), (count, 1, 1)) for n in ("camera", "leftHand", "rightHand")}
    for pose in poses.values():
        pose[:, :3, :3] = rotations(count)
        pose[:, :3, 3] = generator.normal(size=(count, 3))
    file = folder / f"{name}.hdf5"
    with h5py.File(file, "w") as content:
        for key, pose in poses.items():
            content[f"transforms/{key}"] = pose.astype(np.float32)
        content.attrs.update(llm_description=text, llm_description2="put it back", which_llm_description=which)
    write_video(file.with_suffix(".mp4"), grey_ramp(count))
    return file, poses


def write_calvin(root, windows=((3, 8, "open the drawer"), (8, 12, "lift the block")), angle=3.0):
    """Steps 0 to 12; the first Euler angle of the state grows by 0.1 a step from `angle`, and wraps at pi."""
    (root / "lang_annotations").mkdir(parents=True)
    for step in range(13):
        state, action = np.arange(15) + step / 100, np.arange(7) + step / 100
        state[3:6] = (angle + 0.1 * step, 0.2, -0.3)
        action[3:6] = state[3:6] + 0.05
        state[3:6], action[3:6] = wrapped(state[3:6]), wrapped(action[3:6])
        action[6] = -1.0 if step % 2 else 1.0
        np.savez_compressed(
            root / f"episode_{step:07d}.npz",
            rgb_static=grey_ramp(1, 200, first=step)[0],
            rgb_gripper=grey_ramp(1, 84, first=step + 1)[0],
            depth_static=np.zeros((200, 200), np.float32),
            actions=action,
            rel_actions=np.zeros(7),
            robot_obs=state,
            scene_obs=np.zeros(24),
        )
    annotations = {
        "language": {
            "ann": [text for *_, text in windows],
            "task": ["task"] * len(windows),
            "emb": np.zeros((len(windows), 1, 4), np.float32),
        },
        "info": {"episodes": [], "indx": [(np.int64(a), np.int64(b)) for a, b, _ in windows]},
    }
    np.save(root / "lang_annotations" / "auto_lang_ann.npy", annotations, allow_pickle=True)
    return root


def wrapped(angle):
    return (np.asarray(angle) + np.pi) % (2 * np.pi) - np.pi


def encoded(frame, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(frame).save(out, kind)
    return out.getvalue()


def write_rlds(
    root,
    lengths=(4, 6, 5),
    shards=2,
    texts=None,
    action_keys=False,
    text_in="steps",
    size=(24, 32),
    kind="array_record",
    plain_text=False,
    splits=("train",),
):
    """Step i of episode e: state is i, action i + 10 e, image of brightness number i, wrist number i + 1."""
    f = tfds.features
    action = f.Tensor(shape=(7,), dtype=np.float32)
    instruction = f.Tensor(shape=(), dtype=np.str_) if plain_text else f.Text()
    observation = {
        "image": f.Image(shape=(*size, 3), encoding_format="png"),
        "wrist_image": f.Tensor(shape=(24, 32, 3), dtype=np.uint8),
        "depth": f.Tensor(shape=(24, 32), dtype=np.float32),
        "state": f.Tensor(shape=(8,), dtype=np.float64),
    }
    step = {"observation": observation, "action": {"pose": action, "end": np.bool_} if action_keys else action}
    if text_in == "steps":
        step["language_instruction"] = instruction
    elif text_in == "observation":
        observation["natural_language_instruction"] = instruction
    features = f.FeaturesDict({"steps": f.Dataset(step), "episode_metadata": {"language_instruction": f.Text()}})

    def example(e):
        text = texts[e] if texts else f"do {e}"
        steps = []
        for i in range(lengths[e]):
            vector = np.full(7, i + 10 * e, np.float32)
            row = {
                "observation": {
                    "image": encoded(grey_ramp(1, 24, 32, i)[0]),
                    "wrist_image": grey_ramp(1, 24, 32, i + 1)[0],
                    "depth": np.zeros((24, 32), np.float32),
                    "state": np.full(8, i, np.float64),
                },
                "action": {"pose": vector, "end": False} if action_keys else vector,
            }
            if text_in == "steps":
                row["language_instruction"] = text
            elif text_in == "observation":
                row["observation"]["natural_language_instruction"] = text
            steps.append(row)
        return {"steps": steps, "episode_metadata": {"language_instruction": text}}

    return write_tfds(root, "toy", features, map(example, range(len(lengths))), len(lengths), shards, kind, splits)


def write_openx(root, name, observation, action, text_in="observation", count=3):
    """A TFRecord data set of one episode, with the features of Open-X: {key: width, or (H, W) of a picture}.

    Values are 100 times the number of the key plus the step; `action` {key: width} or one width; 0 is a plain number.
    """
    f = tfds.features

    def feature(shape):
        picture = isinstance(shape, tuple)
        return f.Image(shape=(*shape, 3)) if picture else f.Tensor(shape=(shape,) * (shape > 0), dtype=np.float32)

    def value(shape, number, i):
        if isinstance(shape, tuple):
            return encoded(grey_ramp(1, *shape, number + i)[0])
        return np.full((shape,) * (shape > 0), 100 * number + i, np.float32)

    text = f.Tensor(shape=(), dtype=np.str_)
    one = not isinstance(action, dict)
    step = {
        "observation": {k: feature(s) for k, s in observation.items()},
        "action": feature(action) if one else {k: feature(s) for k, s in action.items()},
    }
    if text_in == "observation":
        step["observation"]["natural_language_instruction"] = text
    else:
        step["language_instruction"] = text
    steps = []
    for i in range(count):
        row = {
            "observation": {k: value(s, n, i) for n, (k, s) in enumerate(observation.items())},
            "action": value(action, 0, i) if one else {k: value(s, n, i) for n, (k, s) in enumerate(action.items())},
        }
        if text_in == "observation":
            row["observation"]["natural_language_instruction"] = "push"
        else:
            row["language_instruction"] = "push"
        steps.append(row)
    features = f.FeaturesDict({"steps": f.Dataset(step)})
    return write_tfds(root, name, features, [{"steps": steps}], 1, 1, "tfrecord")


class TFRecordWriter:
    """Writes TFRecord: length, its masked CRC-32C, the bytes, their masked CRC-32C."""

    def __init__(self, path):
        self._path, self._records = Path(path), []

    def write(self, data):
        length = struct.pack("<Q", len(data))
        self._records.append(length + self._crc(length) + data + self._crc(data))

    def close(self):
        self._path.write_bytes(b"".join(self._records))

    def _crc(self, data):
        crc = google_crc32c.value(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def write_tfds(root, name, features, examples, count, shards, kind, splits=("train",)):
    """`count` examples in each split, which get them in turn, as TFDS prepares them."""
    root.mkdir(parents=True)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    examples, infos = list(examples), []
    for split in splits:
        counts = []
        for shard, numbers in enumerate(np.array_split(np.arange(count), shards)):
            path = f"{root}/{name}-{split}.{kind}-{shard:05d}-of-{shards:05d}"
            writer = TFRecordWriter(path) if kind == "tfrecord" else ArrayRecordWriter(path, "group_size:1")
            for number in numbers.tolist():
                writer.write(features.serialize_example(examples[number]))
            writer.close()
            counts.append(len(numbers))
        names = tfds.core.ShardedFileTemplate(
            data_dir=root, dataset_name=name, split=split, filetype_suffix=kind, template=template
        )
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=counts, num_bytes=1, filename_template=names))
    tfds.folder_dataset.write_metadata(
        data_dir=root, features=features, split_infos=infos, filename_template=template, check_data=False
    )
    return root


def write_hdf5(path, count=20, text=("stack the cups",), fps=30.0, times=None, wrist=True, **attributes):
    """The state is the step, the action the step plus 0.5; the gripper is a tenth of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = np.repeat(np.arange(count, dtype=np.float32)[:, None], 6, 1)
    steps[:, 5] /= 10
    with h5py.File(path, "w") as file:
        file["action"], file["obs/state"] = steps + 0.5, steps
        file["timestamp"] = (np.arange(count) / fps if times is None else times).astype(np.float32)
        file["obs/front_image"] = grey_ramp(count, 24, 32)
        if wrist:
            file["obs/wrist_image"] = grey_ramp(count, 24, 32, 1)
        file.attrs["task_index"] = 0
        if text:
            file.attrs["language_instruction"] = list(text)
        file.attrs.update(attributes)
    return path


def write_libero_hdf5(path, counts=(6, 4), text="turn on the stove", convention="opengl", size=(24, 32)):
    """Demonstration d: state is 10 d plus the step, action a tenth of it; frames are numbered as the state, the wrist's
    one later. The upper left corner of every frame is black; bottom row first unless `convention` is "opencv"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(
            problem_info=json.dumps({"language_instruction": text}), num_demos=len(counts), tag="libero-v1"
        )
        if convention:
            data.attrs["macros_image_convention"] = convention
        for d, count in enumerate(counts):
            steps = 10.0 * d + np.arange(count)
            demo = data.create_group(f"demo_{d}")
            demo["actions"] = np.repeat(steps[:, None], 7, 1) / 10
            for key, width in (("ee_states", 6), ("gripper_states", 2), ("joint_states", 7)):
                demo[f"obs/{key}"] = np.repeat(steps[:, None], width, 1)
            for number, key in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
                frames = grey_ramp(count, *size, first=10 * d + number).copy()
                frames[:, :4, :4] = 0
                demo[f"obs/{key}"] = frames if convention == "opencv" else frames[:, ::-1]
    return path


def write_clips(root, captions, kind="csv", counts=(12, 9)):
    """Clips a/0.mp4, a/1.mp4, ... with `captions` {file: caption}."""
    (root / "a").mkdir(parents=True)
    for i, count in enumerate(counts):
        write_video(root / "a" / f"{i}.mp4", grey_ramp(count))
    write_captions(root, captions, kind)
    return root


def write_captions(root, captions, kind="csv"):
    rows = [{"file": file, "caption": caption} for file, caption in captions.items()]
    if kind == "csv":
        lines = ["caption,file"] + [f'"{row["caption"]}",{row["file"]}' for row in rows]
        (root / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), root / "captions.parquet")


def write_lerobot(
    root,
    lengths=(5, 6),
    version="v2.1",
    names=("observation.state", "action"),
    widths=(6, 6),
    videos=("observation.images.front",),
    pictures=(),
    without=(),
    first_time=0.0,
    size=(32, 32),
    scale=1.0,
    **info,
):
    """A LeRobot data set: row i of the whole set has state i and action i + 0.5, both times `scale`, and frame number
    i + k in camera k.

    `pictures` are cameras stored as PNG in Parquet; `without` are columns that are left out of the rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    v3 = version == "v3.0"
    chunk = "chunk-{chunk_index:03d}" if v3 else "chunk-{episode_chunk:03d}"
    vectors = list(zip(names, widths, strict=True))
    features = {
        name: {"dtype": "float32", "shape": [width], "names": [f"j{i}" for i in range(width - 1)] + ["gripper"]}
        for name, width in vectors
    }
    camera = {"shape": [*size, 3], "names": ["height", "width", "channel"]}
    content = {
        "codebase_version": version,
        "robot_type": "so100",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "fps": 30,
        "data_path": f"data/{chunk}/" + ("file-{file_index:03d}" if v3 else "episode_{episode_index:06d}") + ".parquet",
        "video_path": f"videos/{{video_key}}/{chunk}/file-{{file_index:03d}}.mp4"
        if v3
        else f"videos/{chunk}/{{video_key}}/episode_{{episode_index:06d}}.mp4",
        "features": features
        | {key: {"dtype": "video"} | camera for key in videos}
        | {key: {"dtype": "image"} | camera for key in pictures},
    } | info
    tables, episodes, first = [], [], 0
    for e, length in enumerate(lengths):
        steps = first + np.arange(length)
        rows = {name: [[scale * (i + 0.5 * n)] * width for i in steps] for n, (name, width) in enumerate(vectors)}
        rows |= {
            "timestamp": (first_time + np.arange(length) / 30).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, e),
            "index": steps,
            "task_index": np.full(length, e % 2),
        }
        for k, key in enumerate(pictures):
            frames = halved(grey_ramp(length, *size, first=first + k))
            rows[key] = [{"bytes": encoded(frame), "path": f"{i}.png"} for i, frame in enumerate(frames)]
        tables.append(pa.table({k: v for k, v in rows.items() if k not in without}))
        row = {"episode_index": e, "length": length}
        if v3:
            row |= {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": first}
            row["dataset_to_index"] = first + length
            for key in videos:
                row |= {f"videos/{key}/{n}": 0 for n in ("chunk_index", "file_index")}
                row |= {f"videos/{key}/from_timestamp": first / 30, f"videos/{key}/to_timestamp": (first + length) / 30}
        episodes.append(row)
        first += length
    tasks = [{"task_index": i, "task": text} for i, text in enumerate(("push", "pull"))]
    for folder in ("meta/episodes/chunk-000", "data/chunk-000") if v3 else ("meta", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(content), encoding="utf-8")
    if v3:
        pq.write_table(pa.Table.from_pylist(tasks), root / "meta/tasks.parquet")
        pq.write_table(pa.Table.from_pylist(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
        pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet", row_group_size=4)
    else:
        (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)), encoding="utf-8")
        (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, episodes)), encoding="utf-8")
    for e, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        if not v3:
            name = content["data_path"].format(episode_chunk=0, chunk_index=0, episode_index=e, file_index=e)
            pq.write_table(table, root / name, row_group_size=4)
        for k, key in enumerate(() if v3 else videos):
            path = root / content["video_path"].format(
                video_key=key, episode_chunk=0, chunk_index=0, episode_index=e, file_index=e
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, halved(grey_ramp(length, *size, first=sum(lengths[:e]) + k)))
    for k, key in enumerate(videos if v3 else ()):
        path = root / content["video_path"].format(video_key=key, chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, halved(grey_ramp(sum(lengths), *size, first=k)))
    return root


def write_libero(root, lengths=(5, 6), widths=(8, 7), **more):
    """LIBERO as openpi's converter writes it: pictures in Parquet, `state` and `actions`, LeRobot v2.0."""
    names, pictures = ("state", "actions"), ("image", "wrist_image")
    return write_lerobot(root, lengths, "v2.0", names, widths, (), pictures, robot_type="panda", **more)

